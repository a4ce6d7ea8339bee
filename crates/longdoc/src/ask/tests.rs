use longhaul_engine::LongContext;

use super::*;
use crate::testing::{SearchModel, encode};

fn document(name: &str, text: &str) -> Document {
    Document { name: name.into(), text: text.into() }
}

const QUESTION: &str = "What is the secret code of Oslo?";
const FACT: &str = "Snow fell. The secret code of Oslo is 48213. It thawed.";

fn run(model: &mut SearchModel, documents: &[Document], question: &str) -> Result<Answer> {
    ask(model, documents, question, &AskOptions { max_tokens: 20, ..AskOptions::default() }, &mut ())
}

#[test]
fn one_document_stands_alone_in_the_prompt() {
    assert_eq!(prompt(&[document("a.txt", "Some text.")], "Why?"), "Some text.\n\nWhy?");
}

#[test]
fn several_documents_have_headings() {
    let documents = [document("a\n.txt", "One."), document("b.md", "Two.")];
    assert_eq!(prompt(&documents, "Why?"), "# a .txt\n\nOne.\n\n# b.md\n\nTwo.\n\nWhy?");
}

#[test]
fn answers_with_passage_and_sizes() {
    let mut model = SearchModel::new(LongContext::Dca);
    let documents = [document("weather.txt", "It rained. It stopped."), document("codes.txt", FACT)];
    let answer = run(&mut model, &documents, &format!("  {QUESTION}\n")).unwrap();
    assert_eq!(answer.answer, "The secret code of Oslo is 48213.");
    let passage = answer.passage.clone().unwrap();
    assert_eq!(
        (passage.document.as_str(), passage.text.as_str()),
        ("codes.txt", "The secret code of Oslo is 48213.")
    );
    assert_eq!(answer.documents[1].tokens, encode(FACT).len());
    assert_eq!(answer.documents[1].bytes, FACT.len());
    assert!(model.prompts.borrow()[0].contains(&format!("thawed.\n\n{QUESTION}\n")));
    let json = serde_json::to_value(&answer).unwrap();
    assert_eq!(json["passage"]["line"], 1);
    assert_eq!(json["finish_reason"], "stop");
}

#[test]
fn an_absent_answer_has_no_passage() {
    let mut model = SearchModel::new(LongContext::Dca);
    let answer = run(&mut model, &[document("a.txt", FACT)], "What is the secret code of Rome?").unwrap();
    assert_eq!(answer.answer, "I do not know.");
    assert_eq!(answer.passage, None);
    assert!(serde_json::to_value(&answer).unwrap()["passage"].is_null());
}

#[test]
fn refuses_empty_questions_and_documents() {
    let mut model = SearchModel::new(LongContext::Dca);
    let documents = [document("a.txt", FACT)];
    assert!(matches!(run(&mut model, &documents, " \n\t"), Err(LongdocError::EmptyQuestion)));
    assert!(matches!(run(&mut model, &[], QUESTION), Err(LongdocError::NoDocuments)));
    let empty = [document("a.txt", FACT), document("b.txt", " \n")];
    assert!(
        matches!(run(&mut model, &empty, QUESTION), Err(LongdocError::Empty { name }) if name == "b.txt")
    );
    assert!(model.prompts.borrow().is_empty());
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_with_the_numbers() {
    let mut model = SearchModel::new(LongContext::None);
    let documents = [document("a.txt", FACT), document("b.txt", &FACT.repeat(10))];
    let fits = run(&mut model, &documents, QUESTION).unwrap().prompt_tokens + 20;
    model.max_model_len = fits;
    assert!(run(&mut model, &documents, QUESTION).is_ok());
    model.max_model_len = fits - 3;
    let error = run(&mut model, &documents, QUESTION).unwrap_err();
    let text = error.to_string();
    let LongdocError::TooLong(numbers) = error else { panic!("{text}") };
    assert_eq!((numbers.over(), numbers.prompt_tokens, numbers.max_model_len), (3, fits - 20, fits - 3));
    let sizes =
        format!("a.txt: {} tokens, b.txt: {} tokens", encode(FACT).len(), encode(&FACT.repeat(10)).len());
    for part in
        [sizes.as_str(), "3 too many", "--max-model-len", "--long-context dca", "fewer or shorter documents"]
    {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn options_reach_the_model() {
    struct Watch(usize, String);
    impl Observer for Watch {
        fn prefill(&mut self, done: usize, _: usize) {
            self.0 = done;
        }
        fn text(&mut self, piece: &str) {
            self.1 += piece;
        }
    }
    let mut model = SearchModel::new(LongContext::Dca);
    let options = AskOptions { system: Some("Be brief.".into()), ..AskOptions::default() };
    let mut watch = Watch(0, String::new());
    let answer = ask(&mut model, &[document("a", FACT)], QUESTION, &options, &mut watch).unwrap();
    assert!(model.prompts.borrow()[0].starts_with("[system]\nBe brief.\n[user]\nSnow fell."));
    assert_eq!((watch.0, watch.1), (answer.prompt_tokens, answer.answer));
}
