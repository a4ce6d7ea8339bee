//! What only an enemy sends, against the real `longhaul serve` with the demo model: every case has its status, none
//! panics, none is an error of the server, and none gets in without a key. The classes are named in docs/faults.md.

#![cfg(target_os = "linux")]

#[path = "hostile/access.rs"]
mod access;
mod common;
#[path = "hostile/corpus.rs"]
mod corpus;
#[path = "hostile/fields.rs"]
mod fields;
#[path = "hostile/framing.rs"]
mod framing;
#[path = "hostile/text.rs"]
mod text;

use corpus::Corpus;

/// A status that a case may have; 0 is a connection that was closed without an answer.
type Status = u16;

#[test]
fn nobody_gets_in_without_a_key() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut file, format!("{}\n", access::KEY).as_bytes()).unwrap();
    let mut corpus = Corpus::start("access", &["--api-key-file", file.path().to_str().unwrap()]);
    access::routes_by_targets_and_hosts(&mut corpus);
    access::methods(&mut corpus);
    access::keys(&mut corpus);
    access::every_documented_route_is_classified(&mut corpus);
    let cases = corpus.end();
    assert!(cases >= 600, "{cases}");
}

#[test]
fn every_field_has_bounds() {
    let mut corpus = Corpus::start("fields", &["--max-num-seqs", "32"]);
    fields::boundary_table(&mut corpus);
    fields::token_ids(&mut corpus);
    fields::counts(&mut corpus);
    fields::unsupported_content(&mut corpus);
    let cases = corpus.end();
    assert!(cases >= 700, "{cases}");
}

#[test]
fn texts_templates_and_schemas_are_bounded() {
    let mut corpus = Corpus::start("texts", &["--enable-request-id-headers"]);
    text::empty_prompts(&mut corpus);
    text::odd_texts(&mut corpus);
    text::stop_strings(&mut corpus);
    text::special_tokens_in_messages(&mut corpus);
    text::template_variables(&mut corpus);
    text::request_templates(&mut corpus);
    text::schemas(&mut corpus);
    text::labels(&mut corpus);
    text::malformed_json(&mut corpus);
    let cases = corpus.end();
    assert!(cases >= 200, "{cases}");
}

#[test]
fn what_is_no_http_is_refused() {
    let mut corpus = Corpus::start("framing", &[]);
    framing::raw_requests(&mut corpus);
    framing::heads(&mut corpus);
    framing::chunks(&mut corpus);
    framing::encodings(&mut corpus);
    framing::bodies(&mut corpus);
    framing::slow_clients(&mut corpus);
    framing::health_under_large_bodies(&mut corpus);
    let cases = corpus.end();
    assert!(cases >= 100, "{cases}");
}
