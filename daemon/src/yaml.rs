//! YAML from people's hands: parsing with errors that say where, what was found and what was likely meant.

use std::fmt;

use serde::de::DeserializeOwned;
use serde_saphyr::Error;

/// Why a piece of YAML was not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct YamlError {
    /// Line, counted from 1; 0 when the parser could not tell.
    pub line: u64,
    /// What was found there, and what would be right.
    pub message: String,
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => f.write_str(&self.message),
            line => write!(f, "line {line}: {}", self.message),
        }
    }
}

impl std::error::Error for YamlError {}

impl YamlError {
    /// The same error about a document that begins after `lines` others.
    #[must_use]
    pub fn after(mut self, lines: u64) -> Self {
        if self.line != 0 {
            self.line += lines;
        }
        self
    }
}

/// Parses one document. Lines in errors are lines of `text`.
///
/// # Errors
/// [`YamlError`] with the line; an unknown key comes with the known key it resembles.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, YamlError> {
    if let Some(error) = tab_indentation(text) {
        return Err(error);
    }
    serde_saphyr::from_str(text).map_err(|error| describe(&error))
}

/// One document of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Document<'a> {
    /// Its text.
    pub text: &'a str,
    /// How many lines of the stream come before it.
    pub lines_before: u64,
}

/// Splits a stream into documents; those of blanks and comments alone are passed over.
///
/// `---` at the start of a line is a document marker wherever it stands (YAML 1.2, 9.1.2), so this needs no parser.
pub fn documents(stream: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut lines_before, mut blank) = (0, 0, true);
    let (mut offset, mut number) = (0, 0);
    for line in stream.split_inclusive('\n') {
        let next = offset + line.len();
        number += 1;
        let word = line.trim_end();
        if word == "---" || word.starts_with("--- ") {
            if !blank {
                let text = &stream[start..offset];
                documents.push(Document { text, lines_before });
            }
            // What follows the marker on its line is only ever a comment in what people write.
            (start, lines_before, blank) = (next, number, true);
        } else {
            blank &= word.trim_start().is_empty() || word.trim_start().starts_with('#');
        }
        offset = next;
    }
    if !blank {
        let text = &stream[start..];
        documents.push(Document { text, lines_before });
    }
    documents
}

/// The candidate that differs from `word` by a slip of the hand: at most a third of its letters.
pub fn likely<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let allowed = (word.chars().count() / 3).max(1);
    candidates
        .into_iter()
        .map(|candidate| (slips(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= allowed)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours (optimal string alignment) from `a` to `b`.
fn slips(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// A tab where indentation should be: YAML forbids it, and the parser's own message seldom says so.
fn tab_indentation(text: &str) -> Option<YamlError> {
    let (number, _) = text
        .lines()
        .enumerate()
        .find(|(_, line)| line.trim_start_matches(' ').starts_with('\t') && !line.trim().is_empty())?;
    let message = "a tab is used for indentation; YAML wants spaces".to_owned();
    Some(YamlError {
        line: number as u64 + 1,
        message,
    })
}

fn describe(error: &Error) -> YamlError {
    let error = error.without_snippet();
    let line = error.location().map_or(0, |location| location.line());
    let message = match error {
        Error::SerdeUnknownField { field, expected, .. } => match likely(field, expected.iter().copied()) {
            Some(meant) => format!("unknown key {field:?}; did you mean {meant:?}?"),
            None => format!("unknown key {field:?}; known here: {}", expected.join(", ")),
        },
        Error::SerdeUnknownVariant {
            variant, expected, ..
        } => match likely(variant, expected.iter().copied()) {
            Some(meant) => format!("unknown value {variant:?}; did you mean {meant:?}?"),
            None => format!(
                "unknown value {variant:?}; one of {} is wanted",
                expected.join(", ")
            ),
        },
        Error::SerdeMissingField { field, .. } => format!("the key {field:?} is missing"),
        Error::Message { msg, .. } => msg.clone(),
        other => {
            // The parser's own text ends with the place, which is said already.
            let text = other.to_string();
            text.lines().next().unwrap_or("not YAML").to_owned()
        }
    };
    YamlError { line, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only its parsing is looked at")]
    struct Sample {
        kind: String,
        #[serde(default)]
        spec: Option<u32>,
    }

    #[test]
    fn a_slip_in_a_key_is_named_with_its_line_and_the_likely_word() {
        let error = parse::<Sample>("kind: Service\nsepc: 1\n").unwrap_err();
        assert_eq!(error.line, 2, "{error}");
        assert_eq!(error.message, "unknown key \"sepc\"; did you mean \"spec\"?");
    }

    #[test]
    fn a_tab_is_called_a_tab() {
        let error = parse::<Sample>("kind: Service\n\tspec: 1\n").unwrap_err();
        assert_eq!((error.line, error.message.contains("tab")), (2, true));
    }

    #[test]
    fn documents_keep_their_line_numbers() {
        let stream = "# nothing\n---\nkind: A\n--- # the second\n\n---\nkind: B\nsepc: 1\n";
        let documents = documents(stream);
        assert_eq!(documents.len(), 2);
        assert!(parse::<Sample>(documents[0].text).is_ok());
        let error = parse::<Sample>(documents[1].text).unwrap_err();
        assert_eq!(error.after(documents[1].lines_before).line, 8);
    }

    #[test]
    fn words_that_share_little_are_not_suggested() {
        assert_eq!(likely("banana", ["spec", "kind"]), None);
        assert_eq!(
            likely("clusterCIDR", ["clusterCIDRs", "serviceCIDRs"]),
            Some("clusterCIDRs")
        );
    }
}
