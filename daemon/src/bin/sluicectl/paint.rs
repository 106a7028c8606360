//! Colours for what somebody reads on a terminal.

use std::io::IsTerminal;

/// Colours, where somebody looks.
pub struct Paint {
    on: bool,
}

impl Paint {
    /// Colours for a terminal that wants them, else none (<https://no-color.org>).
    pub fn for_stdout() -> Self {
        Self {
            on: std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
        }
    }

    fn with(&self, code: u8, text: &str) -> String {
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    /// In red.
    pub fn red(&self, text: &str) -> String {
        self.with(31, text)
    }

    /// In green.
    pub fn green(&self, text: &str) -> String {
        self.with(32, text)
    }

    /// In yellow.
    pub fn yellow(&self, text: &str) -> String {
        self.with(33, text)
    }
}
