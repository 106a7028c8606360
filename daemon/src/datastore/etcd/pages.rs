//! All keys of a range, a page at a time: what a member sends at once is bounded.

use anyhow::Result;
use etcd_client::{Client, GetOptions, KeyValue, KvClient};

use super::members::answer;

/// How many keys are asked for at once.
const PAGE: i64 = 500;

/// The largest answer that is taken, in bytes: a page of large objects.
pub const LARGEST: usize = 256 << 20;

/// The rest of a range.
pub struct Pages {
    kv: KvClient,
    doing: String,
    /// The first key that was not read; none if all were.
    from: Option<Vec<u8>>,
    end: Vec<u8>,
    /// As of which change all pages are; 0 before the first one.
    pub revision: i64,
}

impl Pages {
    /// All keys that begin with `folder`, which ends with a slash.
    pub fn below(client: &Client, folder: &str) -> Self {
        Self {
            kv: client.kv_client().max_decoding_message_size(LARGEST),
            doing: format!("listing {folder}"),
            from: Some(folder.into()),
            // The key behind all others: `0` follows `/`.
            end: format!("{}0", folder.trim_end_matches('/')).into(),
            revision: 0,
        }
    }

    /// The next page; none after the last one.
    ///
    /// # Errors
    /// etcd cannot be asked, or the revision of the first page was compacted meanwhile.
    pub async fn next(&mut self) -> Result<Option<Vec<KeyValue>>> {
        let Some(from) = self.from.take() else {
            return Ok(None);
        };
        let asked = GetOptions::new()
            .with_range(self.end.clone())
            .with_limit(PAGE)
            .with_revision(self.revision);
        let mut page = answer(&self.doing, self.kv.get(from, Some(asked))).await?;
        if self.revision == 0 {
            self.revision = page.header().map_or(0, |header| header.revision());
        }
        let more = page.more();
        let found = page.take_kvs();
        self.from = found
            .last()
            .filter(|_| more)
            .map(|last| [last.key(), &[0]].concat());
        Ok(Some(found))
    }
}
