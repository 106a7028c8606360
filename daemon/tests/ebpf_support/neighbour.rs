//! Another host: a network namespace with a thread of its own that does what it is told.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use nix::sched::{CloneFlags, unshare};

type Task = Box<dyn FnOnce() + Send>;

/// The host. It ends with this, and with it its end of every veth pair.
pub struct Neighbour {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    namespace: std::fs::File,
}

impl Neighbour {
    /// A host with nothing but loopback.
    pub fn new(node: &super::Node) -> Self {
        let cgroup = node.options.cgroup.clone().unwrap();
        let (tasks, received) = channel::<Task>();
        let (ready, started) = channel();
        let thread = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            super::enter(&cgroup.join(".."));
            super::ip("link set lo up");
            ready
                .send(std::fs::File::open("/proc/thread-self/ns/net").unwrap())
                .unwrap();
            received.into_iter().for_each(|task| task());
        });
        let namespace = started.recv().unwrap();
        Self {
            tasks: Some(tasks),
            thread: Some(thread),
            namespace,
        }
    }

    /// Joins it to the caller's namespace: `there` is the device on it, `here` the caller's.
    pub fn join(&self, here: &str, there: &str) {
        super::ip(&format!("link add {here} type veth peer name {there}"));
        let (process, fd) = (std::process::id(), self.namespace.as_raw_fd());
        super::ip(&format!("link set {there} netns /proc/{process}/fd/{fd}"));
        super::ip(&format!("link set {here} up"));
        let there = there.to_owned();
        self.run(move || super::ip(&format!("link set {there} up")));
    }

    /// Runs `task` there and waits for its result.
    pub fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let task = Box::new(move || done.send(task()).unwrap());
        self.tasks.as_ref().unwrap().send(task).unwrap();
        result.recv().expect("what runs on the neighbour must not panic")
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.tasks = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
