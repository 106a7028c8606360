//! What of an object is passed over, so that one element of nonsense does not take the rest of it away.
//!
//! Elements of lists are: a port, an endpoint, an address, a range. A value that says how the whole object is to be
//! understood (its name, its type, a policy) is not: such an object is refused, because no guess at it would be safe.

use std::fmt;

/// How many elements are named; the rest of them are counted.
const NAMED: usize = 3;

/// The elements of one object that are passed over.
#[derive(Debug, Default)]
pub struct PassedOver {
    object: String,
    named: Vec<String>,
    more: usize,
}

impl PassedOver {
    /// Says whose elements they are.
    pub fn of(&mut self, object: String) {
        self.object = object;
    }

    /// Takes down that `field` is passed over, and why.
    pub fn add(&mut self, field: impl fmt::Display, reason: impl fmt::Display) {
        if self.named.len() < NAMED {
            self.named.push(format!("{field}: {reason}"));
        } else {
            self.more += 1;
        }
    }

    /// What `checked` holds; its error is taken down as that of `field`.
    pub fn keep<T>(&mut self, field: impl fmt::Display, checked: Result<T, String>) -> Option<T> {
        checked.map_err(|reason| self.add(field, reason)).ok()
    }

    /// Why nothing is left of the object: what was found wrong with `field` of it.
    pub fn nothing_left(&self, field: &str) -> String {
        format!("{}: {}; nothing of {field} is left", self.object, self.elements())
    }

    /// What there is to tell; nothing if nothing was passed over.
    pub fn told(&self) -> Option<String> {
        (!self.named.is_empty()).then(|| format!("{}: served without {}", self.object, self.elements()))
    }

    fn elements(&self) -> String {
        let named = self.named.join("; ");
        match self.more {
            0 => named,
            more => format!("{named}; and {more} more like it"),
        }
    }
}
