//! The entries that make up one connection ([`Connection`] has their kinds), and their removal beside programs that enter others.
//!
//! A client may use a port again at any moment, and its next connection has keys of the last one. So what was read a moment ago is not
//! taken for what is there, and what is removed by mistake is put back.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use sluice_ebpf_types::{Connection, ConnectionKey, direction, role};

use super::tables::Tables;

/// Longer than a program takes for a packet, and interrupts besides: what it was entering is there after that.
const PACKET: Duration = Duration::from_millis(1);

/// The connections removed in one go, whose clients may have begun others meanwhile.
#[derive(Debug, Default)]
pub(super) struct Removals {
    /// The keys of their `FORWARD` entries.
    keys: Vec<ConnectionKey>,
}

impl Removals {
    /// Removes a connection, given its `FORWARD` entry as it was read, but for its stand-in's port where that `lingers`. Where there is
    /// another by now, it is left alone. Says how many entries went.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove(
        &mut self,
        tables: &mut Tables,
        key: &ConnectionKey,
        forward: &Connection,
        lingers: bool,
    ) -> Result<usize> {
        if tables.connections.get(key)? != Some(*forward) {
            return Ok(0);
        }
        // First, as the programs do it: a client that comes after this has no connection, and is given all of one.
        match tables.connections.take_entry(key)? {
            None => return Ok(0),
            // Begun between these two calls.
            Some(there) if there != *forward => {
                tables.connections.add(key, &there)?;
                return Ok(0);
            }
            Some(_) => self.keys.push(*key),
        }
        let mut removed = 1;
        for (part, entry) in parts(key, forward) {
            if !(lingers && entry.role == role::UNSOURCE) {
                removed += usize::from(tables.connections.remove(&part)?);
            }
        }
        complete(tables, key)?;
        Ok(removed)
    }

    /// Removes an entry that was found without its connection, unless it has one by now.
    ///
    /// # Errors
    /// The kernel's.
    pub fn remove_orphan(
        &mut self,
        tables: &mut Tables,
        key: &ConnectionKey,
        entry: &Connection,
    ) -> Result<()> {
        if !has_master(tables, key, entry)? {
            self.keys.extend(master_key(tables, key, entry)?);
            tables.connections.remove(key)?;
        }
        Ok(())
    }

    /// Gives the connections that were just being entered what of theirs was removed with their clients' last ones.
    ///
    /// # Errors
    /// The kernel's.
    pub fn finish(self, tables: &mut Tables) -> Result<()> {
        if self.keys.is_empty() {
            return Ok(());
        }
        sleep(PACKET);
        self.keys.iter().try_for_each(|key| complete(tables, key))
    }
}

/// Makes a connection whole, if there is one under this key of a `FORWARD` entry.
fn complete(tables: &mut Tables, key: &ConnectionKey) -> Result<()> {
    let Some(forward) = tables.connections.get(key)? else {
        return Ok(());
    };
    parts(key, &forward)
        .iter()
        .try_for_each(|(part, entry)| tables.connections.add(part, entry))
}

/// All entries of the connection with this `FORWARD` entry but that one, as they are made.
fn parts(key: &ConnectionKey, forward: &Connection) -> Vec<(ConnectionKey, Connection)> {
    let rewrites = |role, address, port| Connection {
        role,
        address,
        port,
        ..Connection::default()
    };
    let undest = ConnectionKey {
        source: forward.address,
        source_port: forward.port,
        destination: key.source,
        destination_port: key.source_port,
        direction: direction::OUT,
        ..*key
    };
    let mut parts = vec![(
        undest,
        rewrites(role::UNDEST, key.destination, key.destination_port),
    )];
    if !forward.stand_in.is_unspecified() {
        let unsource = ConnectionKey {
            destination: forward.stand_in,
            destination_port: forward.stand_in_port,
            direction: direction::IN,
            ..undest
        };
        parts.push((unsource, rewrites(role::UNSOURCE, key.source, key.source_port)));
        let source = ConnectionKey {
            destination: forward.address,
            destination_port: forward.port,
            direction: direction::OUT,
            ..*key
        };
        parts.push((
            source,
            rewrites(role::SOURCE, forward.stand_in, forward.stand_in_port),
        ));
    }
    parts
}

/// Whether the connection this entry is part of has its `FORWARD` entry, and that knows of this one.
///
/// # Errors
/// The kernel's.
pub(super) fn has_master(tables: &Tables, key: &ConnectionKey, entry: &Connection) -> Result<bool> {
    let Some(master) = master_key(tables, key, entry)? else {
        return Ok(false);
    };
    let forward = tables.connections.get(&master)?;
    Ok(forward.is_some_and(|forward| parts(&master, &forward).iter().any(|(part, _)| part == key)))
}

/// The key of the `FORWARD` entry of the connection that this entry, which is another one, is part of, if that can be told.
fn master_key(tables: &Tables, key: &ConnectionKey, entry: &Connection) -> Result<Option<ConnectionKey>> {
    // From each role to client and endpoint, and by these to the frontend.
    let (client, backend) = match entry.role {
        role::SOURCE => (
            (key.source, key.source_port),
            (key.destination, key.destination_port),
        ),
        role::UNSOURCE => ((entry.address, entry.port), (key.source, key.source_port)),
        _ => (
            (key.destination, key.destination_port),
            (key.source, key.source_port),
        ),
    };
    let undest = ConnectionKey {
        source: backend.0,
        source_port: backend.1,
        destination: client.0,
        destination_port: client.1,
        direction: direction::OUT,
        ..*key
    };
    let frontend = match entry.role {
        role::UNDEST => Some(*entry),
        _ => tables.connections.get(&undest)?,
    };
    Ok(frontend.map(|frontend| ConnectionKey {
        source: client.0,
        source_port: client.1,
        destination: frontend.address,
        destination_port: frontend.port,
        direction: direction::IN,
        ..*key
    }))
}
