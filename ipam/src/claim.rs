//! Addresses given but not yet final: whoever fails on the way to wiring a pod gives them back by doing nothing.

use std::fs;

use crate::directory::inode_of;
use crate::error::Error;
use crate::record::Allocation;
use crate::store::Store;

/// Addresses just given, which go back when this is dropped before [`Claim::keep`].
#[derive(Debug)]
#[must_use = "dropping a claim gives its addresses back"]
pub struct Claim<'a> {
    pub(crate) store: &'a Store,
    pub(crate) allocation: Allocation,
    /// The owner's file: another one under the same name is another claim's.
    pub(crate) inode: u64,
    pub(crate) kept: bool,
}

impl Claim<'_> {
    /// What was given.
    pub fn allocation(&self) -> &Allocation {
        &self.allocation
    }

    /// Makes it final.
    ///
    /// # Errors
    /// [`Error::Overtaken`] when a DEL freed it meanwhile: whatever was built on it must go.
    pub fn keep(mut self) -> Result<Allocation, Error> {
        self.kept = true;
        if inode_of(&self.store.owner(&self.allocation.attachment))? == Some(self.inode) {
            return Ok(self.allocation.clone());
        }
        Err(Error::Overtaken {
            attachment: self.allocation.attachment.clone(),
        })
    }

    /// Takes everything back without a rest: nobody ever sent from these addresses.
    pub(crate) fn undo_locked(mut self) {
        self.kept = true;
        self.take_back();
    }

    fn take_back(&self) {
        let held = self
            .allocation
            .addresses
            .iter()
            .map(|address| self.store.held(*address));
        for path in held.chain([self.store.owner(&self.allocation.attachment)]) {
            // Only what is this claim's own; what cannot be removed now is left to DEL and GC, which find the owner.
            if matches!(inode_of(&path), Ok(Some(inode)) if inode == self.inode)
                && fs::remove_file(&path).is_err()
            {
                return;
            }
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Ok(_lock) = self.store.lock()
        {
            self.take_back();
        }
    }
}
