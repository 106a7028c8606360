//! How Services get into the kernel, in figures under the names that dashboards know from kube-proxy
//! (pkg/proxy/metrics/metrics.go), and the process's own (<https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics>).

use std::fs;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

type Seconds = Gauge<f64, AtomicU64>;

/// All of them; shared by who counts and who tells.
#[derive(Debug)]
pub struct Figures {
    registry: Registry,
    syncs: Histogram,
    full_syncs: Histogram,
    partial_syncs: Histogram,
    programming: Histogram,
    last_sync: Seconds,
    last_queued: Seconds,
    service_changes: Counter,
    endpoint_changes: Counter,
    cpu: Counter<f64, AtomicU64>,
    resident: Gauge,
}

impl Default for Figures {
    fn default() -> Self {
        let durations = || Histogram::new(exponential_buckets(0.001, 2.0, 15));
        let mut figures = Self {
            registry: Registry::default(),
            syncs: durations(),
            full_syncs: durations(),
            partial_syncs: durations(),
            programming: Histogram::new(programming_buckets()),
            last_sync: Seconds::default(),
            last_queued: Seconds::default(),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            cpu: Counter::default(),
            resident: Gauge::default(),
        };
        figures.register();
        figures
    }
}

/// As kube-proxy has them: fine for what is usual, up to five minutes.
fn programming_buckets() -> impl Iterator<Item = f64> {
    let linear = |start: f64, width: f64, count: u32| {
        (0..count).map(move |step| f64::from(step).mul_add(width, start))
    };
    linear(0.25, 0.25, 2)
        .chain(linear(1.0, 1.0, 59))
        .chain(linear(60.0, 5.0, 12))
        .chain(linear(120.0, 30.0, 7))
}

impl Figures {
    fn register(&mut self) {
        let started = Seconds::default();
        started.set(seconds_of(SystemTime::now()));
        let registry = &mut self.registry;
        for (name, help, histogram) in [
            (
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "How long changed Services took into the kernel",
                &self.syncs,
            ),
            (
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "How long all Services took into the kernel",
                &self.full_syncs,
            ),
            (
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "How long single Services took into the kernel",
                &self.partial_syncs,
            ),
            (
                "kubeproxy_network_programming_duration_seconds",
                "From the change of a pod or Service, as its EndpointSlice says, until the kernel has it",
                &self.programming,
            ),
        ] {
            registry.register(name, help, histogram.clone());
        }
        for (name, help, gauge) in [
            (
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "When a sync last went through",
                &self.last_sync,
            ),
            (
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "When a Service or endpoint last changed",
                &self.last_queued,
            ),
            (
                "process_start_time_seconds",
                "When the process started, since 1970",
                &started,
            ),
        ] {
            registry.register(name, help, gauge.clone());
        }
        // The name's `_total` is put behind by the format.
        registry.register(
            "kubeproxy_sync_proxy_rules_service_changes",
            "Services that were said to have changed",
            self.service_changes.clone(),
        );
        registry.register(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "EndpointSlices that were said to have changed",
            self.endpoint_changes.clone(),
        );
        registry.register("process_cpu_seconds", "Processor time used", self.cpu.clone());
        registry.register(
            "process_resident_memory_bytes",
            "Memory in use",
            self.resident.clone(),
        );
    }

    /// A Service changed.
    pub fn service_changed(&self) {
        self.service_changes.inc();
        self.last_queued.set(seconds_of(SystemTime::now()));
    }

    /// An EndpointSlice changed.
    pub fn endpoints_changed(&self) {
        self.endpoint_changes.inc();
        self.last_queued.set(seconds_of(SystemTime::now()));
    }

    /// A sync went through, of `all` Services or of those that changed, and took this long; single ones may have failed.
    pub fn synced(&self, all: bool, took: Duration) {
        let took = took.as_secs_f64();
        self.syncs.observe(took);
        if all {
            self.full_syncs.observe(took);
        } else {
            self.partial_syncs.observe(took);
        }
        self.last_sync.set(seconds_of(SystemTime::now()));
    }

    /// The kernel has all of what was changed in the cluster at these times, be it that there was nothing to write for it.
    pub fn programmed(&self, triggers: &[Timestamp]) {
        let now = Timestamp::now();
        for trigger in triggers {
            // Another host's clock may be ahead.
            self.programming
                .observe(now.duration_since(*trigger).as_secs_f64().max(0.0));
        }
    }

    /// All as text, in the format of OpenMetrics 1.0.
    ///
    /// # Errors
    /// None that are known: text takes everything.
    pub fn text(&self) -> Result<String, std::fmt::Error> {
        self.look_at_process();
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    fn look_at_process(&self) {
        let of_system = |name| sysconf(name).ok().flatten().unwrap_or(1);
        let number = |text: &str, place: usize| text.split(' ').nth(place)?.parse::<i64>().ok();
        // proc_pid_stat(5): behind the name, which may hold anything, fields 14 and 15 of all are time in user and kernel mode.
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        let behind_name = stat.rsplit(") ").next().unwrap_or_default();
        if let (Some(user), Some(kernel)) = (number(behind_name, 11), number(behind_name, 12)) {
            let used = (user + kernel) as f64 / of_system(SysconfVar::CLK_TCK) as f64;
            // It never goes back.
            self.cpu.inc_by((used - self.cpu.get()).max(0.0));
        }
        // proc_pid_statm(5): the second field is what is resident, in pages.
        let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        if let Some(pages) = number(&statm, 1) {
            self.resident.set(pages * of_system(SysconfVar::PAGE_SIZE));
        }
    }
}

fn seconds_of(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// O5
    #[test]
    fn what_dashboards_ask_of_kube_proxy_is_there_and_counts() {
        let figures = Figures::default();
        figures.service_changed();
        figures.endpoints_changed();
        let minute_ago = Timestamp::now() - Duration::from_secs(61);
        figures.synced(true, Duration::from_millis(3));
        figures.synced(false, Duration::from_micros(300));
        figures.programmed(&[minute_ago]);
        let text = figures.text().unwrap();
        for line in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count 2",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{le=\"0.001\"} 1",
            "kubeproxy_sync_full_proxy_rules_duration_seconds_count 1",
            "kubeproxy_sync_partial_proxy_rules_duration_seconds_count 1",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"60.0\"} 0",
            "kubeproxy_network_programming_duration_seconds_bucket{le=\"65.0\"} 1",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
        let value = |name: &str| -> f64 {
            let found = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            found.trim().parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes ") > 1e6);
        assert!(value("process_start_time_seconds ") > 1.7e9);
        assert!(value("process_cpu_seconds_total ") < 60.0);
        assert!(text.ends_with("# EOF\n"));
    }
}
