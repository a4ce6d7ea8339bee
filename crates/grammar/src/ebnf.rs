//! EBNF as llama.cpp's GBNF and vLLM's `grammar` have it, rewritten to the library's notation.
//!
//! `name ::= …` with `|`, `( )`, `* + ?`, `{n} {n,} {n,m}`, `"literals"`, `[classes]`, `.` and `# comments`; the first rule
//! is called `root`. Rules that are regular become terminals: the library matches those as a whole, where a rule of single
//! characters would be cut greedily.

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use crate::error::GrammarError;
use crate::source::literal;

/// Deepest group, and most symbols of a grammar.
const MAX_DEPTH: usize = 24;
const MAX_SYMBOLS: usize = 100_000;

/// Whether a grammar has rules `name ::= …`.
pub(crate) fn is_ebnf(text: &str) -> bool {
    text.lines().any(|line| {
        let rest = line.trim_start();
        let name = rest.bytes().take_while(|b| is_name_byte(*b)).count();
        name > 0 && rest.get(name..).is_some_and(|rest| rest.trim_start().starts_with("::="))
    })
}

/// # Errors
/// What is no EBNF; the message names the line.
pub(crate) fn to_lark(text: &str) -> Result<String, GrammarError> {
    let mut rules = Parser::new(text).rules()?;
    let root = rules.names.get("root").copied().filter(|root| rules.bodies.contains_key(root));
    let Some(root) = root else {
        return Err(GrammarError::invalid("the grammar has no rule `root ::= …`"));
    };
    for (name, index) in &rules.names {
        if !rules.bodies.contains_key(index) {
            return Err(GrammarError::invalid(format!("the rule `{name}` is used and not defined")));
        }
    }
    let terminals = terminals(&rules);
    let mut out = format!("start: {}\n", symbol(root, &terminals));
    let mut indices: Vec<usize> = rules.bodies.keys().copied().collect();
    indices.sort_unstable();
    for index in indices {
        let Some(body) = rules.bodies.remove(&index) else { continue };
        // Writing to a string cannot fail.
        let _ = write!(out, "{}: ", symbol(index, &terminals));
        print(&body, &terminals, &mut out);
        out.push('\n');
    }
    Ok(out)
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')
}

/// A part of a rule.
enum Node {
    Literal(String),
    /// A regular expression for one character.
    Class(String),
    Rule(usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat(Box<Node>, usize, Option<usize>),
}

struct Rules {
    names: HashMap<String, usize>,
    bodies: HashMap<usize, Node>,
}

/// The name of a rule in the library's notation: of a terminal, or of a rule.
fn symbol(index: usize, terminals: &HashSet<usize>) -> String {
    format!("{}{index}", if terminals.contains(&index) { 'T' } else { 'r' })
}

/// Rules are terminals when all rules that they use are. What can be empty is a rule: the library takes no empty terminals.
fn terminals(rules: &Rules) -> HashSet<usize> {
    let mut waiting: HashMap<usize, usize> = HashMap::new();
    let mut users: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut ready = Vec::new();
    for (index, body) in &rules.bodies {
        let mut used = Vec::new();
        uses(body, &mut used);
        used.sort_unstable();
        used.dedup();
        if used.is_empty() {
            ready.push(*index);
        }
        waiting.insert(*index, used.len());
        for other in used {
            users.entry(other).or_default().push(*index);
        }
    }
    let mut terminals = HashSet::new();
    while let Some(index) = ready.pop() {
        let Some(body) = rules.bodies.get(&index) else { continue };
        if is_nullable(body) {
            continue;
        }
        terminals.insert(index);
        for user in users.get(&index).into_iter().flatten() {
            if let Some(count) = waiting.get_mut(user) {
                *count -= 1;
                if *count == 0 {
                    ready.push(*user);
                }
            }
        }
    }
    terminals
}

fn uses(node: &Node, used: &mut Vec<usize>) {
    match node {
        Node::Literal(_) | Node::Class(_) => {}
        Node::Rule(index) => used.push(*index),
        Node::Sequence(nodes) | Node::Choice(nodes) => nodes.iter().for_each(|node| uses(node, used)),
        Node::Repeat(node, ..) => uses(node, used),
    }
}

/// Whether a node may be empty, if no rule that it uses is.
fn is_nullable(node: &Node) -> bool {
    match node {
        Node::Literal(text) => text.is_empty(),
        Node::Class(_) | Node::Rule(_) => false,
        Node::Sequence(nodes) => nodes.iter().all(is_nullable),
        Node::Choice(nodes) => nodes.iter().any(is_nullable),
        Node::Repeat(node, least, _) => *least == 0 || is_nullable(node),
    }
}

fn print(node: &Node, terminals: &HashSet<usize>, out: &mut String) {
    match node {
        Node::Literal(text) => out.push_str(&literal(text)),
        Node::Class(class) => {
            let _ = write!(out, "/{class}/");
        }
        Node::Rule(index) => out.push_str(&symbol(*index, terminals)),
        Node::Sequence(nodes) if nodes.is_empty() => out.push_str("\"\""),
        Node::Sequence(nodes) => join(nodes, " ", terminals, out),
        Node::Choice(nodes) => join(nodes, " | ", terminals, out),
        Node::Repeat(node, least, most) => {
            print(node, terminals, out);
            let _ = match (least, most) {
                (0, None) => write!(out, "*"),
                (1, None) => write!(out, "+"),
                (0, Some(1)) => write!(out, "?"),
                (least, None) => write!(out, "{{{least},}}"),
                (least, Some(most)) => write!(out, "{{{least},{most}}}"),
            };
        }
    }
}

fn join(nodes: &[Node], between: &str, terminals: &HashSet<usize>, out: &mut String) {
    let is_group = nodes.len() > 1;
    out.push_str(if is_group { "(" } else { "" });
    for (at, node) in nodes.iter().enumerate() {
        out.push_str(if at > 0 { between } else { "" });
        print(node, terminals, out);
    }
    out.push_str(if is_group { ")" } else { "" });
}

struct Parser<'a> {
    rest: &'a str,
    line: usize,
    symbols: usize,
    names: HashMap<String, usize>,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: text, line: 1, symbols: 0, names: HashMap::new() }
    }

    fn error<T>(&self, message: &str) -> Result<T, GrammarError> {
        Err(GrammarError::invalid(format!("line {} of the grammar: {message}", self.line)))
    }

    fn rules(mut self) -> Result<Rules, GrammarError> {
        let mut bodies = HashMap::new();
        loop {
            self.skip();
            if self.rest.is_empty() {
                break;
            }
            let Some(name) = self.name() else { return self.error("a rule `name ::= …` is expected") };
            self.skip();
            if !self.eat("::=") {
                return self.error("`::=` is expected behind the rule's name");
            }
            let index = self.index(name);
            let body = self.choice(0)?;
            if bodies.insert(index, body).is_some() {
                return self.error("the rule is defined twice");
            }
        }
        Ok(Rules { names: self.names, bodies })
    }

    fn index(&mut self, name: &str) -> usize {
        let next = self.names.len();
        *self.names.entry(name.to_owned()).or_insert(next)
    }

    fn bump(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let character = characters.next()?;
        self.rest = characters.as_str();
        if character == '\n' {
            self.line += 1;
        }
        Some(character)
    }

    fn eat(&mut self, text: &str) -> bool {
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Leaves white space and comments behind.
    fn skip(&mut self) {
        loop {
            if self.rest.starts_with('#') {
                while !self.rest.is_empty() && !self.rest.starts_with('\n') {
                    self.bump();
                }
            } else if self.rest.starts_with(char::is_whitespace) {
                self.bump();
            } else {
                return;
            }
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let length = self.rest.bytes().take_while(|b| is_name_byte(*b)).count();
        let name = self.rest.get(..length).filter(|name| !name.is_empty())?;
        self.rest = self.rest.get(length..).unwrap_or_default();
        Some(name)
    }

    fn at_rule(&self) -> bool {
        let name = self.rest.bytes().take_while(|b| is_name_byte(*b)).count();
        name > 0 && self.rest.get(name..).is_some_and(|rest| rest.trim_start().starts_with("::="))
    }

    fn choice(&mut self, depth: usize) -> Result<Node, GrammarError> {
        if depth > MAX_DEPTH {
            return self.error("groups are nested too deeply");
        }
        let mut nodes = vec![self.sequence(depth)?];
        while self.eat("|") {
            nodes.push(self.sequence(depth)?);
        }
        Ok(if nodes.len() == 1 {
            nodes.pop().unwrap_or(Node::Sequence(Vec::new()))
        } else {
            Node::Choice(nodes)
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Node, GrammarError> {
        let mut nodes = Vec::new();
        loop {
            self.skip();
            if self.rest.is_empty() || self.rest.starts_with(['|', ')']) || self.at_rule() {
                return Ok(Node::Sequence(nodes));
            }
            self.symbols += 1;
            if self.symbols > MAX_SYMBOLS {
                return self.error("the grammar has too many symbols");
            }
            let node = self.symbol(depth)?;
            nodes.push(self.repeated(node)?);
        }
    }

    fn symbol(&mut self, depth: usize) -> Result<Node, GrammarError> {
        if let Some(name) = self.name() {
            return Ok(Node::Rule(self.index(name)));
        }
        match self.bump() {
            Some('"') => {
                let mut text = String::new();
                loop {
                    match self.bump() {
                        Some('"') => return Ok(Node::Literal(text)),
                        Some('\\') => text.push(self.escape()?),
                        Some('\n') | None => return self.error("the string does not end"),
                        Some(other) => text.push(other),
                    }
                }
            }
            Some('[') => self.class(),
            Some('.') => Ok(Node::Class("(?s:.)".into())),
            Some('(') => {
                let node = self.choice(depth + 1)?;
                if self.eat(")") { Ok(node) } else { self.error("the group does not end") }
            }
            Some(other) => self.error(&format!("{other:?} is not expected here")),
            None => self.error("a symbol is expected"),
        }
    }

    fn class(&mut self) -> Result<Node, GrammarError> {
        let mut class = String::from(if self.eat("^") { "[^" } else { "[" });
        let empty = class.len();
        loop {
            let range = self.rest.starts_with('-') && class.len() > empty && !self.rest.starts_with("-]");
            match self.bump() {
                Some(']') if class.len() == empty => return self.error("the class is empty"),
                Some(']') => {
                    class.push(']');
                    return Ok(Node::Class(class));
                }
                Some('-') if range => class.push('-'),
                Some('\\') => {
                    let character = self.escape()?;
                    let _ = write!(class, "\\x{{{:x}}}", u32::from(character));
                }
                Some('\n') | None => return self.error("the class does not end"),
                Some(other) => {
                    let _ = write!(class, "\\x{{{:x}}}", u32::from(other));
                }
            }
        }
    }

    fn escape(&mut self) -> Result<char, GrammarError> {
        let digits = match self.bump() {
            Some('n') => return Ok('\n'),
            Some('r') => return Ok('\r'),
            Some('t') => return Ok('\t'),
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(other) if other.is_ascii_punctuation() => return Ok(other),
            _ => return self.error("the escape is not known"),
        };
        let code = self.rest.get(..digits).and_then(|hex| u32::from_str_radix(hex, 16).ok());
        match code.and_then(char::from_u32) {
            Some(character) => {
                self.rest = self.rest.get(digits..).unwrap_or_default();
                Ok(character)
            }
            None => self.error("the escape is no character"),
        }
    }

    /// A node with the repetitions behind it.
    fn repeated(&mut self, mut node: Node) -> Result<Node, GrammarError> {
        let mut count = 0;
        loop {
            let (least, most) = if self.eat("*") {
                (0, None)
            } else if self.eat("+") {
                (1, None)
            } else if self.eat("?") {
                (0, Some(1))
            } else if self.eat("{") {
                self.counts()?
            } else {
                return Ok(node);
            };
            count += 1;
            if count > MAX_DEPTH {
                return self.error("too many repetitions of repetitions");
            }
            node = match most {
                Some(0) => Node::Sequence(Vec::new()),
                // A group of its own, so that two repetitions do not run together.
                _ if count > 1 => Node::Repeat(
                    Box::new(Node::Sequence(vec![node, Node::Literal(String::new())])),
                    least,
                    most,
                ),
                _ => Node::Repeat(Box::new(node), least, most),
            };
        }
    }

    fn counts(&mut self) -> Result<(usize, Option<usize>), GrammarError> {
        let Some((inside, rest)) = self.rest.split_once('}') else {
            return self.error("the repetition does not end");
        };
        let parse = |text: &str| text.trim().parse::<u16>().ok().map(usize::from);
        let counts = match inside.split_once(',') {
            None => parse(inside).map(|count| (count, Some(count))),
            Some((least, most)) => {
                let least = if least.trim().is_empty() { Some(0) } else { parse(least) };
                match (least, most.trim().is_empty()) {
                    (Some(least), true) => Some((least, None)),
                    (Some(least), false) => parse(most).map(|most| (least, Some(most))),
                    (None, _) => None,
                }
            }
        };
        match counts {
            Some((least, most)) if most.is_none_or(|most| least <= most) => {
                self.rest = rest;
                Ok((least, most))
            }
            _ => self.error("a repetition is {n}, {n,} or {n,m} with numbers up to 65535"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regular_rules_become_terminals() {
        let sql =
            "root ::= \"SELECT \" column \" from t\" # the only table\ncolumn ::= \"a \" |\n  \"b \"{2,3}\n";
        assert!(is_ebnf(sql));
        let lark = to_lark(sql).unwrap();
        assert_eq!(lark, "start: T0\nT0: (\"SELECT \" T1 \" from t\")\nT1: (\"a \" | \"b \"{2,3})\n");
        let sum = to_lark("root ::= num (\"+\" root)?\nnum ::= [0-9]+ ws\nws ::= \" \"*").unwrap();
        assert_eq!(
            sum,
            "start: r0\nr0: (T1 (\"+\" r0)?)\nT1: (/[\\x{30}-\\x{39}]/+ r2)\nr2: \" \"*\n"
                .replace("T1: (/", "r1: (/")
                .replace("(T1 ", "(r1 ")
        );
        let class = to_lark(r#"root ::= [^\]\\/"a-] "é\x41\u00e9\"" ."#).unwrap();
        assert_eq!(
            class,
            "start: T0\nT0: (/[^\\x{5d}\\x{5c}\\x{2f}\\x{22}\\x{61}\\x{2d}]/ \"éAé\\\"\" /(?s:.)/)\n"
        );
    }

    #[test]
    fn what_is_no_ebnf_is_refused_with_its_line() {
        for (text, expected) in [
            ("a ::= \"x\"", "no rule `root"),
            ("root ::= a", "`a` is used and not defined"),
            ("root ::= \"a\nb ::= \"c\"", "line 2 of the grammar: the string does not end"),
            ("root ::= (\"a\"", "group does not end"),
            ("root ::= [", "class does not end"),
            ("root ::= []", "class is empty"),
            ("root ::= \"a\"{3,2}", "a repetition is"),
            ("root ::= \"a\"{99999}", "a repetition is"),
            ("root ::= \"\\q\"", "escape is not known"),
            ("root ::= \"\\ud800\"", "escape is no character"),
            ("root ::= ) \"a\"", "a rule `name ::= …` is expected"),
            ("root ::= \"a\"\nroot ::= \"b\"", "defined twice"),
            ("root ::= $", "is not expected here"),
            ("root ::= *", "is not expected here"),
        ] {
            let error = to_lark(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let deep = format!("root ::= {}\"a\"{}", "(".repeat(1000), ")".repeat(1000));
        assert!(to_lark(&deep).unwrap_err().to_string().contains("nested too deeply"));
        assert!(!is_ebnf("start: \"a ::= b\""));
    }
}
