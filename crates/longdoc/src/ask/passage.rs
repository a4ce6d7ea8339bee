//! The passage of the documents that an answer rests on, by weighted overlap of words.
//!
//! Every term of the answer weighs its rarity in the documents (inverse sentence frequency), times 3 for numbers and 2
//! for names, times ¼ when the question already said it (repeating the question proves nothing). The score of a passage
//! is the share of that weight that it covers, so a number or name that stands nowhere in the documents counts against
//! every passage. Terms of the question only break ties.

use std::collections::HashMap;
use std::ops::Range;

use serde::Serialize;

use crate::Document;
use crate::sentences::sentences;
use crate::words::{Kind, for_each_term};

/// Least share of an answer's weight that a passage must cover. Found by trial: an answer with the right words around
/// a wrong number or name scores 0.1 to 0.3, a quoted fact above 0.9, a fair paraphrase 0.5 to 0.8.
pub const MIN_SUPPORT: f64 = 0.5;

/// Most sentences of a passage.
const MAX_WINDOW: usize = 3;
/// What covering all of the question adds to the rank: less than any term of substance in the answer.
const QUESTION_SHARE: f64 = 0.1;
/// What every sentence after the first takes from the rank, so that a passage grows only for more of the answer.
const SENTENCE_COST: f64 = 0.06;
/// Share of a term's weight that is left when the question said it.
const ECHO: f64 = 0.25;
/// Sentences added to the count, so that in a document of three sentences an absent word is not much rarer than a
/// present one.
const PRIOR_SENTENCES: f64 = 10.0;
/// Sentences of an answer that are looked up one by one.
const MAX_CLAIMS: usize = 31;

/// Where an answer stands in the documents.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Passage {
    /// Name of the document.
    pub document: String,
    /// First byte in the document's text.
    pub start: usize,
    /// Byte after the last.
    pub end: usize,
    /// Line of the first byte, from 1.
    pub line: usize,
    /// The text itself: one to three sentences.
    pub text: String,
    /// Share of the answer's weight that it covers, [`MIN_SUPPORT`] to 1.
    pub score: f64,
}

#[derive(Default)]
struct Term {
    kind_weight: f64,
    /// Bit 0: in the answer; bit n: in its n-th sentence.
    claims: u32,
    in_question: bool,
    sentences: u32,
}

/// Finds the sentence, or up to three in a row, that best supports `answer`; where the answer as a whole has no support,
/// its sentences are tried alone. Linear in the documents' length. Of equal passages the first wins. `None` when none
/// reaches [`MIN_SUPPORT`], or when the answer says nothing that could be looked up ("Yes.").
pub fn find_passage(documents: &[Document], answer: &str, question: &str) -> Option<Passage> {
    let (index, mut terms) = collect_terms(answer, question);
    if terms.iter().all(|t| t.claims == 0 || t.kind_weight == 0.0) {
        return None;
    }
    let mut spans: Vec<(usize, Range<usize>)> = Vec::new();
    let mut hits: Vec<u32> = Vec::new();
    let mut hit_ranges: Vec<Range<usize>> = Vec::new();
    let mut last_seen: Vec<usize> = vec![usize::MAX; terms.len()];
    for (number, document) in documents.iter().enumerate() {
        for span in sentences(&document.text) {
            let (sentence, from) = (spans.len(), hits.len());
            for_each_term(document.text.get(span.clone()).unwrap_or_default(), |term, _| {
                if let Some(&id) = index.get(term)
                    && let Some(seen) = last_seen.get_mut(id as usize)
                    && *seen != sentence
                {
                    *seen = sentence;
                    hits.push(id);
                }
            });
            hit_ranges.push(from..hits.len());
            spans.push((number, span));
        }
    }
    for &id in &hits {
        if let Some(term) = terms.get_mut(id as usize) {
            term.sentences += 1;
        }
    }
    let count = spans.len() as f64 + PRIOR_SENTENCES;
    let weights: Vec<(f64, f64, u32)> = terms
        .iter()
        .map(|t| {
            let n = f64::from(t.sentences);
            let weight = t.kind_weight * (1.0 + (count - n + 0.5) / (n + 0.5)).ln();
            let echo = if t.in_question { ECHO } else { 1.0 };
            (weight * echo, if t.in_question { weight } else { 0.0 }, t.claims)
        })
        .collect();
    let search = Search { spans: &spans, hits: &hits, hit_ranges: &hit_ranges, weights: &weights };
    let found = search.best(1).or_else(|| {
        // A long answer draws on several places: show the one that its best supported sentence rests on.
        let claims = terms.iter().fold(0, |all, t| all | t.claims);
        let alone = (1..=MAX_CLAIMS).filter_map(|n| search.best(claims & (1 << n)));
        alone.reduce(|best, next| if next.rank > best.rank { next } else { best })
    })?;
    passage(documents, &spans, &found)
}

fn collect_terms(answer: &str, question: &str) -> (HashMap<String, u32>, Vec<Term>) {
    let mut index = HashMap::new();
    let mut terms: Vec<Term> = Vec::new();
    let mut add = |text: &str, claims: u32, in_question: bool| {
        for_each_term(text, |term, kind| {
            let id = *index.entry(term.to_owned()).or_insert_with(|| {
                terms.push(Term::default());
                (terms.len() - 1) as u32
            });
            if let Some(entry) = terms.get_mut(id as usize) {
                entry.claims |= claims;
                entry.in_question |= in_question;
                entry.kind_weight = entry.kind_weight.max(match kind {
                    Kind::Number => 3.0,
                    Kind::Name => 2.0,
                    Kind::Word => 1.0,
                    Kind::Stop => 0.0,
                });
            }
        });
    };
    for (n, range) in sentences(answer).into_iter().enumerate() {
        let bit = if n < MAX_CLAIMS { 1 << (n + 1) } else { 0 };
        add(answer.get(range).unwrap_or_default(), 1 | bit, false);
    }
    add(question, 0, true);
    (index, terms)
}

struct Search<'a> {
    spans: &'a [(usize, Range<usize>)],
    hits: &'a [u32],
    hit_ranges: &'a [Range<usize>],
    /// Weight in the answer, weight in the question, claims.
    weights: &'a [(f64, f64, u32)],
}

struct Found {
    first: usize,
    last: usize,
    support: f64,
    rank: f64,
}

impl Search<'_> {
    /// The best window for the terms of the answer whose claims meet `claim`, if it has support.
    fn best(&self, claim: u32) -> Option<Found> {
        let (mut answer_total, mut question_total) = (0.0, 0.0);
        for &(answer, question, claims) in self.weights {
            answer_total += if claims & claim != 0 { answer } else { 0.0 };
            question_total += question;
        }
        if answer_total <= 0.0 {
            return None;
        }
        let mut best: Option<Found> = None;
        let mut seen = vec![usize::MAX; self.weights.len()];
        for first in 0..self.spans.len() {
            // A window that starts with a sentence without any term is never better than the one after it.
            if self.hit_ranges.get(first).is_none_or(Range::is_empty) {
                continue;
            }
            let (mut answer, mut question) = (0.0, 0.0);
            for last in first..(first + MAX_WINDOW).min(self.spans.len()) {
                let (Some(start), Some(end)) = (self.spans.get(first), self.spans.get(last)) else { break };
                if start.0 != end.0 {
                    break;
                }
                for &id in
                    self.hit_ranges.get(last).and_then(|r| self.hits.get(r.clone())).unwrap_or_default()
                {
                    if let (Some(seen), Some(&(a, q, claims))) =
                        (seen.get_mut(id as usize), self.weights.get(id as usize))
                        && *seen != first
                    {
                        *seen = first;
                        answer += if claims & claim != 0 { a } else { 0.0 };
                        question += q;
                    }
                }
                let support = answer / answer_total;
                let question = if question_total > 0.0 { question / question_total } else { 0.0 };
                let rank = support + QUESTION_SHARE * question - SENTENCE_COST * (last - first) as f64;
                // The margin keeps rounding from preferring a later, equal passage.
                if support >= MIN_SUPPORT && best.as_ref().is_none_or(|b| rank > b.rank + 1e-9) {
                    best = Some(Found { first, last, support, rank });
                }
            }
        }
        best
    }
}

fn passage(documents: &[Document], spans: &[(usize, Range<usize>)], found: &Found) -> Option<Passage> {
    let (number, first) = spans.get(found.first)?;
    let (_, last) = spans.get(found.last)?;
    let document = documents.get(*number)?;
    Some(Passage {
        document: document.name.clone(),
        start: first.start,
        end: last.end,
        line: 1 + document.text.get(..first.start)?.bytes().filter(|&b| b == b'\n').count(),
        text: document.text.get(first.start..last.end)?.to_owned(),
        score: found.support.min(1.0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[&str]) -> Vec<Document> {
        texts.iter().enumerate().map(|(i, t)| Document { name: format!("d{i}"), text: (*t).into() }).collect()
    }

    /// Sentences that share no content word with the tests'.
    fn filler(sentences: usize) -> String {
        (0..sentences)
            .map(|i| format!("Rain fell on valley {} during spring, and farmers waited. ", 1000 + i))
            .collect()
    }

    const QUESTION: &str = "What is the secret code of London?";

    #[test]
    fn finds_the_sentence_with_the_fact() {
        let text = format!("{}\nThe secret code of London is 48213. {}", filler(50), filler(50));
        let documents = documents(&[&text]);
        let found = find_passage(&documents, "The secret code of London is 48213.", QUESTION).unwrap();
        assert_eq!(found.text, "The secret code of London is 48213.");
        assert_eq!(&documents[0].text[found.start..found.end], found.text);
        assert_eq!(found.line, 2);
        assert!(found.score > 0.99);
        // The bare number too.
        assert_eq!(find_passage(&documents, "48213", QUESTION).unwrap().text, found.text);
    }

    #[test]
    fn a_wrong_number_has_no_support() {
        let text = format!("{} The secret code of London is 48213. {}", filler(20), filler(20));
        assert_eq!(find_passage(&documents(&[&text]), "The secret code of London is 99999.", QUESTION), None);
        // Also where the document is that one sentence.
        let short = documents(&["The secret code of London is 48213."]);
        assert_eq!(find_passage(&short, "The secret code of London is 99999.", QUESTION), None);
        assert!(find_passage(&short, "It is 48213.", QUESTION).is_some());
    }

    #[test]
    fn answers_without_content_have_no_passage() {
        let documents = documents(&["The secret code of London is 48213. Yes, it is not."]);
        for answer in
            ["", "   ", "Yes.", "No, it is not.", "...", "I am sorry, the text mentions nothing like that."]
        {
            assert_eq!(find_passage(&documents, answer, QUESTION), None, "{answer}");
        }
    }

    #[test]
    fn the_question_breaks_ties_and_the_first_of_equals_wins() {
        let text = format!(
            "Invoice 48213 was paid. {} The secret code of London is 48213. {} The secret code of London is 48213.",
            filler(9),
            filler(9)
        );
        let found = find_passage(&documents(&[&text]), "48213", QUESTION).unwrap();
        assert_eq!(found.text, "The secret code of London is 48213.");
        assert_eq!(found.start, text.find("The secret").unwrap());
    }

    #[test]
    fn names_the_document() {
        let (a, b) =
            (filler(10), format!("{} Anna Schmidt designed the bridge in 1931. {}", filler(5), filler(5)));
        let found = find_passage(
            &documents(&[&a, &b]),
            "It was designed by Anna Schmidt in 1931.",
            "Who designed it?",
        )
        .unwrap();
        assert_eq!(
            (found.document.as_str(), found.text.as_str()),
            ("d1", "Anna Schmidt designed the bridge in 1931.")
        );
    }

    #[test]
    fn joins_neighbours_only_for_more_of_the_answer() {
        let text =
            format!("{} The bridge was built by Anna Schmidt. It opened in 1931. {}", filler(9), filler(9));
        let found =
            find_passage(&documents(&[&text]), "Anna Schmidt built it, and it opened in 1931.", "Who, when?")
                .unwrap();
        assert_eq!(found.text, "The bridge was built by Anna Schmidt. It opened in 1931.");
        let found = find_passage(&documents(&[&text]), "Anna Schmidt", "Who built the bridge?").unwrap();
        assert_eq!(found.text, "The bridge was built by Anna Schmidt.");
        // Never across documents.
        let apart = documents(&["The bridge was built by Anna Schmidt.", "It opened in 1931."]);
        let found = find_passage(&apart, "Anna Schmidt built the bridge.", "Who, when?").unwrap();
        assert_eq!(found.text, "The bridge was built by Anna Schmidt.");
    }

    #[test]
    fn long_answers_rest_on_their_best_sentence() {
        let text = format!("{} The bridge was built by Anna Schmidt. {}", filler(40), filler(40));
        let answer = "Bridges have fascinated mankind since antiquity and inspired poets. The bridge was built by Anna \
                      Schmidt. Many visitors nowadays photograph such monuments enthusiastically.";
        let found = find_passage(&documents(&[&text]), answer, "Tell me everything.").unwrap();
        assert_eq!(found.text, "The bridge was built by Anna Schmidt.");
    }

    #[test]
    fn works_without_spaces_between_words() {
        let text = "今天天气很好。伦敦的秘密代码是48213。我们去公园散步。东京塔建于1958年。";
        let found =
            find_passage(&documents(&[text]), "伦敦的秘密代码是48213。", "伦敦的秘密代码是什么？").unwrap();
        assert_eq!(found.text, "伦敦的秘密代码是48213。");
        assert_eq!(find_passage(&documents(&[text]), "是77777。", "伦敦的秘密代码是什么？"), None);
        let found = find_passage(&documents(&[text]), "去公园散步", "今天做什么？").unwrap();
        assert_eq!(found.text, "我们去公园散步。");
    }

    #[test]
    fn very_long_lines_give_short_passages() {
        let text = format!(
            "{}the secret code of london is 48213 {}",
            "lorem ipsum ".repeat(20_000),
            "dolor sit ".repeat(20_000)
        );
        let found = find_passage(&documents(&[&text]), "48213", QUESTION).unwrap();
        assert!(found.text.contains("48213") && found.text.len() <= crate::sentences::MAX_SENTENCE);
    }

    #[test]
    fn thousands_separators_do_not_matter() {
        let text = "Revenue was $12,345,678 in 2023. Costs were lower.";
        let found = find_passage(&documents(&[text]), "12345678 dollars", "What was the revenue?").unwrap();
        assert_eq!(found.text, "Revenue was $12,345,678 in 2023.");
    }
}
