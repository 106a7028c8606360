//! What stands in the host's `FORWARD`, and what has to be written. Pure: reads and writes iptables' own notation.

use std::fmt::Write;

use ipnetwork::IpNetwork;

use super::CHAIN;

/// What `iptables -S FORWARD` says, as far as it matters here.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The policy is `DROP`.
    drops: bool,
    /// Position, from 1, of the first rule that refuses whatever comes to it.
    refuses_at: Option<usize>,
    /// Whether a rule leads to [`CHAIN`].
    pub leads_to_ours: bool,
}

impl Found {
    /// Reads the listing of the chain.
    pub fn parse(listing: &str) -> Self {
        let mut found = Self::default();
        let mut position = 0;
        for line in listing.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                ["-P", "FORWARD", policy] => found.drops = *policy == "DROP",
                ["-A", "FORWARD", rule @ ..] => {
                    position += 1;
                    match rule {
                        ["-j", target] if *target == CHAIN => found.leads_to_ours = true,
                        ["-j", "DROP" | "REJECT", ..] if found.refuses_at.is_none() => {
                            found.refuses_at = Some(position);
                        }
                        _ => {}
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// Whether pods' packets are refused unless something lets them through.
    pub fn is_in_the_way(&self) -> bool {
        self.drops || self.refuses_at.is_some()
    }
}

/// The text for `iptables-restore --noflush` that lets packets from and to `cidrs` through; nothing if `ours`, the
/// listing of [`CHAIN`], shows that they are let through already.
pub fn script(found: &Found, ours: &str, cidrs: &[IpNetwork]) -> Option<String> {
    let rules: Vec<String> = cidrs
        .iter()
        .flat_map(|cidr| ["-s", "-d"].map(|side| format!("-A {CHAIN} {side} {cidr} -j ACCEPT")))
        .collect();
    let there: Vec<&str> = ours.lines().filter(|line| line.starts_with("-A ")).collect();
    if found.leads_to_ours && there == rules {
        return None;
    }
    // Naming the chain makes it, or empties it.
    let mut text = format!("*filter\n:{CHAIN} - [0:0]\n");
    for rule in rules {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{rule}");
    }
    if !found.leads_to_ours {
        let _ = match found.refuses_at {
            Some(position) => writeln!(text, "-I FORWARD {position} -j {CHAIN}"),
            None => writeln!(text, "-A FORWARD -j {CHAIN}"),
        };
    }
    text.push_str("COMMIT\n");
    Some(text)
}

/// The text that takes all of it out.
pub fn removal() -> String {
    format!("*filter\n:{CHAIN} - [0:0]\n-D FORWARD -j {CHAIN}\n-X {CHAIN}\nCOMMIT\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "-N SLUICE-FORWARD\n-A SLUICE-FORWARD -s 10.244.0.0/16 -j ACCEPT\n\
                        -A SLUICE-FORWARD -d 10.244.0.0/16 -j ACCEPT\n";

    fn cidrs() -> Vec<IpNetwork> {
        vec!["10.244.0.0/16".parse().unwrap()]
    }

    /// N7
    #[test]
    fn an_open_firewall_is_left_alone() {
        let listing = "-P FORWARD ACCEPT\n-A FORWARD -s 192.0.2.0/24 -j DROP\n-A FORWARD -j DOCKER-USER\n";
        assert!(!Found::parse(listing).is_in_the_way());
    }

    /// N7
    #[test]
    fn dockers_policy_is_answered_after_the_operators_rules() {
        let found = Found::parse("-P FORWARD DROP\n-A FORWARD -j DOCKER-USER\n");
        assert!(found.is_in_the_way());
        let text = script(&found, "", &cidrs()).unwrap();
        assert!(
            text.contains("-A SLUICE-FORWARD -s 10.244.0.0/16 -j ACCEPT\n"),
            "{text}"
        );
        assert!(text.ends_with("-A FORWARD -j SLUICE-FORWARD\nCOMMIT\n"), "{text}");
    }

    /// N7
    #[test]
    fn a_closing_reject_is_answered_just_before_it() {
        let found = Found::parse(
            "-P FORWARD ACCEPT\n-A FORWARD -i lo -j ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n",
        );
        let text = script(&found, "", &cidrs()).unwrap();
        assert!(text.contains("-I FORWARD 2 -j SLUICE-FORWARD\n"), "{text}");
    }

    /// N7
    #[test]
    fn what_stands_as_wanted_is_not_written_again_and_what_does_not_is() {
        let found = Found::parse("-P FORWARD DROP\n-A FORWARD -j SLUICE-FORWARD\n");
        assert_eq!(script(&found, OURS, &cidrs()), None);
        let text = script(&found, "-N SLUICE-FORWARD\n", &cidrs()).unwrap();
        assert!(
            !text.contains("FORWARD -j SLUICE-FORWARD"),
            "the rule that leads there stands: {text}"
        );
    }
}
