//! Requests of a scenario, and whether what came of them is what is wanted.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, anyhow, bail};
use sluice_lab::Node;

use super::{Ask, Finds};

/// How often each of `n` endpoints is asked on average: that one of them is never chosen is then rarer than once in ten thousand
/// times, and asked again.
const ASKED_EACH: usize = 12;

/// Makes the requests once.
///
/// # Errors
/// What came of them is not what `ask` wants; with what it was.
pub fn once(ask: &Ask, from: &Node<'_>, at: &str, over: &str, seen_as: Option<&[IpAddr]>) -> Result<()> {
    let times = match ask.finds {
        Some(Finds::Dropped) => 1,
        // The kernel rations ICMP errors to one receiver (icmp_ratelimit): one is asked for at a time.
        Some(_) if over == "UDP" => 1,
        Some(_) => 2,
        None => ASKED_EACH * ask.answer.len(),
    };
    let (times, size) = (times.to_string(), ask.size.to_string());
    let said = from.run(&["sluice-lab", "talk-ask", over, at, &times, &size])?;
    let lines: Vec<&str> = said.lines().collect();
    if let Some(finds) = ask.finds {
        return came_to_nothing(ask, finds, &lines);
    }
    let mut names = BTreeSet::new();
    for line in &lines {
        let (name, source) = line
            .split_once(' ')
            .ok_or_else(|| anyhow!("a request came to nothing: {line}"))?;
        names.insert(name);
        let source: IpAddr = source
            .parse()
            .with_context(|| format!("{line:?} has no address"))?;
        if seen_as.is_some_and(|wanted| !wanted.contains(&source)) {
            bail!("{name} sees {source}; wanted is one of {seen_as:?}");
        }
    }
    let wanted: BTreeSet<&str> = ask.answer.iter().map(String::as_str).collect();
    if ask.stays {
        if names.len() != 1 || !names.is_subset(&wanted) {
            bail!("{names:?} answered; wanted is one of {wanted:?} alone");
        }
    } else if names != wanted {
        bail!("{names:?} answered; wanted are {wanted:?}");
    }
    Ok(())
}

fn came_to_nothing(ask: &Ask, finds: Finds, lines: &[&str]) -> Result<()> {
    let name = |line: &&str| line.split(' ').next().unwrap_or_default().to_owned();
    let fits = |line: &&str| match finds {
        // What netfilter tells a datagram's sender on its own host, beside the ICMP error.
        Finds::Refused => *line == "refused" || *line == "forbidden",
        // What a firewall on the sender's own host says.
        Finds::Dropped => *line == "silent" || *line == "forbidden",
        Finds::Unreachable => *line == "unreachable",
        Finds::AnswerOrSilence => *line == "silent" || ask.answer.contains(&name(line)),
    };
    if !lines.iter().all(fits) {
        bail!("{lines:?}; wanted is {finds:?}");
    }
    Ok(())
}
