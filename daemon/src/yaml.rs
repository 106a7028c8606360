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

/// Splits a stream into documents, each padded with blank lines so that line numbers stay those of the stream.
///
/// `---` at the start of a line is a document marker wherever it stands (YAML 1.2, 9.1.2), so this needs no parser.
pub fn documents(stream: &str) -> Vec<String> {
    let mut documents = Vec::new();
    let mut current = String::new();
    let mut blank = true;
    for (number, line) in stream.lines().enumerate() {
        if line == "---" || line.starts_with("--- ") {
            if !blank {
                documents.push(std::mem::take(&mut current));
            }
            current = "\n".repeat(number + 1);
            blank = true;
            continue;
        }
        blank &= line.trim().is_empty() || line.trim_start().starts_with('#');
        current.push_str(line);
        current.push('\n');
    }
    if !blank {
        documents.push(current);
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
        let stream = "# nothing\n---\nkind: A\n---\n\n---\nkind: B\nsepc: 1\n";
        let documents = documents(stream);
        assert_eq!(documents.len(), 2);
        assert!(parse::<Sample>(&documents[0]).is_ok());
        assert_eq!(parse::<Sample>(&documents[1]).unwrap_err().line, 8);
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
