//! How fast a pod may receive and send, as the runtime asks for it (`bandwidth`), in the units of the kernel's token
//! bucket. Pure.

use serde_json::Value;

use crate::error::{Code, Failure};

/// Least rate in bits per second, as in Kubernetes: less carries no connection.
const LEAST_RATE: u64 = 1_000;

/// Greatest rate in bits per second, as in Kubernetes.
const GREATEST_RATE: u64 = 1_000_000_000_000_000;

/// Bursts in bits that runtimes send when nobody asked for one (the greatest `int32` and `uint32`). Taken at their word,
/// the limit would begin to hold after the first half gigabyte.
const NOT_ASKED_FOR: [u64; 2] = [i32::MAX as u64, u32::MAX as u64];

/// Least burst in bytes that is chosen: the largest packet a pod hands over in one piece, and its headers, pass whole.
const LEAST_CHOSEN_BURST: u64 = 66 * 1024;

/// How long a packet waits for tokens before newer ones are dropped, in milliseconds.
const LATENCY: u64 = 25;

/// One tick of the kernel's packet scheduler in nanoseconds (`PSCHED_SHIFT` is 6).
const TICK: u64 = 64;

/// Longest time in seconds that a full bucket stands for: the kernel tells no more than 2^32 ticks (275 s).
const LONGEST: u64 = 240;

/// How fast a pod may receive and send.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Into the pod.
    pub ingress: Option<Limit>,
    /// Out of the pod.
    pub egress: Option<Limit>,
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Bytes per second.
    pub rate: u64,
    /// Bytes that may go at once.
    pub burst: u32,
}

impl Limit {
    /// How many bytes may wait: a burst, and what comes in until it is too late for them.
    pub fn queue(&self) -> u32 {
        let waiting = self.rate.saturating_mul(LATENCY) / 1000;
        u32::try_from(waiting.saturating_add(u64::from(self.burst))).unwrap_or(u32::MAX)
    }

    /// How long the burst takes at the rate, in the kernel's ticks of 64 ns.
    pub fn ticks(&self) -> u32 {
        let nanoseconds = u128::from(self.burst) * 1_000_000_000 / u128::from(self.rate.max(1));
        u32::try_from(nanoseconds / u128::from(TICK)).unwrap_or(u32::MAX)
    }
}

impl Bandwidth {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// What `value`, found under `key`, asks for.
    ///
    /// # Errors
    /// Code 7 for what is no number, a burst without a rate, and rates outside 1 kbit/s to 1 Pbit/s.
    pub fn read(key: &str, value: &Value) -> Result<Self, Failure> {
        let Value::Object(keys) = value else {
            return Err(Failure::new(Code::Config, format!("{key}: must be an object")));
        };
        let number = |name: &str| match keys.get(name) {
            None | Some(Value::Null) => Ok(0),
            Some(value) => value.as_u64().ok_or_else(|| {
                let message = format!("{key}.{name} {value}: must be a whole number, not negative");
                Failure::new(Code::Config, message)
            }),
        };
        let limit = |direction: &str| {
            let rate = number(&format!("{direction}Rate"))?;
            let burst = number(&format!("{direction}Burst"))?;
            limit(&format!("{key}.{direction}"), rate, burst)
        };
        Ok(Self {
            ingress: limit("ingress")?,
            egress: limit("egress")?,
        })
    }

    /// Sees to it that a whole packet of `mtu` bytes fits the buckets.
    ///
    /// # Errors
    /// Code 7 for a burst smaller than that: no full packet would ever pass.
    pub fn check_against(&self, mtu: u32) -> Result<(), Failure> {
        // The kernel counts the Ethernet header too.
        let least = mtu.saturating_add(14);
        for (name, limit) in [("ingressBurst", self.ingress), ("egressBurst", self.egress)] {
            if let Some(limit) = limit.filter(|limit| limit.burst < least) {
                let message = format!(
                    "bandwidth.{name} {}: is less than one packet of {least} bytes, so none would pass; ask for {} bits \
                     or more, or leave it out",
                    u64::from(limit.burst) * 8,
                    u64::from(least) * 8
                );
                return Err(Failure::new(Code::Config, message));
            }
        }
        Ok(())
    }
}

/// The bucket for a rate in bits per second and a burst in bits; 0 stands for "not asked for".
fn limit(key: &str, rate: u64, burst: u64) -> Result<Option<Limit>, Failure> {
    let wrong = |message: String| Failure::new(Code::Config, message);
    if rate == 0 {
        if burst != 0 && !NOT_ASKED_FOR.contains(&burst) {
            return Err(wrong(format!("{key}Burst {burst}: needs {key}Rate beside it")));
        }
        return Ok(None);
    }
    if !(LEAST_RATE..=GREATEST_RATE).contains(&rate) {
        return Err(wrong(format!(
            "{key}Rate {rate}: must be {LEAST_RATE} to {GREATEST_RATE} bits per second"
        )));
    }
    let rate = rate / 8;
    let bytes = if burst == 0 || NOT_ASKED_FOR.contains(&burst) {
        // A tenth of a second's worth: enough for a sender to fill the pipe again after it fell silent.
        (rate / 10).max(LEAST_CHOSEN_BURST).min(u64::from(u32::MAX))
    } else {
        burst / 8
    };
    let Ok(burst) = u32::try_from(bytes) else {
        return Err(wrong(format!(
            "{key}Burst {burst}: must be {} bits or less",
            u64::from(u32::MAX) * 8
        )));
    };
    let longest = u32::try_from(rate.saturating_mul(LONGEST)).unwrap_or(u32::MAX);
    Ok(Some(Limit {
        rate,
        burst: burst.min(longest),
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: Value) -> Result<Bandwidth, String> {
        Bandwidth::read("bandwidth", &value).map_err(|failure| failure.to_string())
    }

    /// C10
    #[test]
    fn rates_and_bursts_are_read() {
        let asked = json!({ "ingressRate": 8_000_000, "ingressBurst": 1_600_000, "egressRate": 16_000 });
        let found = read(asked).unwrap();
        let ingress = Limit {
            rate: 1_000_000,
            burst: 200_000,
        };
        assert_eq!(found.ingress, Some(ingress));
        assert_eq!((ingress.queue(), ingress.ticks()), (225_000, 3_125_000));
        assert_eq!(
            found.egress,
            Some(Limit {
                rate: 2_000,
                burst: 66 * 1024
            })
        );
        for nothing in [
            json!({}),
            json!({ "ingressRate": 0, "ingressBurst": 0, "egressRate": null }),
            json!({ "ingressBurst": 4_294_967_295_u64 }),
        ] {
            assert!(read(nothing).unwrap().is_none());
        }
    }

    /// C10
    #[test]
    fn a_burst_nobody_asked_for_does_not_undo_the_limit() {
        for burst in [0_u64, 2_147_483_647, 4_294_967_295] {
            let found = read(json!({ "egressRate": 80_000_000, "egressBurst": burst })).unwrap();
            assert_eq!(found.egress.map(|limit| limit.burst), Some(1_000_000));
        }
        let most = read(json!({ "egressRate": 1_000_000_000_000_000_u64 })).unwrap();
        assert_eq!(most.egress.map(|limit| limit.burst), Some(u32::MAX));
        let long = read(json!({ "egressRate": 1_000, "egressBurst": 8_000_000_000_u64 })).unwrap();
        assert!(
            long.egress
                .is_some_and(|limit| limit.burst == 30_000 && limit.ticks() < u32::MAX)
        );
    }

    /// C10
    #[test]
    fn absurd_limits_are_refused_with_the_reason() {
        for (value, says) in [
            (json!([]), "must be an object"),
            (
                json!({ "ingressRate": -1 }),
                "bandwidth.ingressRate -1: must be a whole number",
            ),
            (json!({ "egressRate": 1.5 }), "must be a whole number"),
            (json!({ "egressRate": "1M" }), "must be a whole number"),
            (
                json!({ "egressRate": 999 }),
                "bandwidth.egressRate 999: must be 1000 to",
            ),
            (
                json!({ "egressRate": 1_000_000_000_000_001_u64 }),
                "must be 1000 to",
            ),
            (
                json!({ "egressBurst": 8000 }),
                "needs bandwidth.egressRate beside it",
            ),
            (
                json!({ "egressRate": 1_000_000_000_000_u64, "egressBurst": 34_359_738_368_u64 }),
                "bits or less",
            ),
        ] {
            let said = read(value.clone()).unwrap_err();
            assert!(said.contains(says), "{value}: {said}");
        }
        let small = read(json!({ "ingressRate": 8000, "ingressBurst": 8000 })).unwrap();
        let said = small.check_against(1450).unwrap_err().to_string();
        assert!(
            said.contains("bandwidth.ingressBurst 8000: is less than one packet of 1464"),
            "{said}"
        );
        assert!(small.check_against(900).is_ok());
    }
}
