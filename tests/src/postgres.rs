//! A Postgres on one of the hosts of a test's network, that can be killed and started again.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use farm_scheduler::queue::testing;

use crate::network::Network;

type Task = Box<dyn FnOnce(&mut testing::Postgres) + Send>;

pub struct Postgres {
    /// What the server's own thread is to do: it is on the host, and the server ends with it.
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    url: String,
}

impl Postgres {
    pub fn on_host(network: &Arc<Network>, host: usize) -> Self {
        let (tasks, todo) = channel::<Task>();
        let (ready, started) = channel();
        let (network, address) = (network.clone(), network.address(host));
        let thread = std::thread::spawn(move || {
            network.enter(host).unwrap();
            let setup = testing::Setup { durable: true, listen: format!("127.0.0.1,{address}") };
            let mut server = testing::Postgres::start(&setup);
            let database = server.database();
            ready.send(database.replace("127.0.0.1", &address.to_string())).unwrap();
            while let Ok(task) = todo.recv() {
                task(&mut server);
            }
        });
        let url = started.recv().unwrap();
        Self { tasks: Some(tasks), thread: Some(thread), url }
    }

    /// As schedulers on other hosts reach it.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// `kill -9`.
    pub fn kill(&self) {
        self.on_its_host(testing::Postgres::kill);
    }

    /// Over the same data.
    pub fn start_again(&self) {
        self.on_its_host(testing::Postgres::start_again);
    }

    /// To the server and all that it has started.
    pub fn signal(&self, signal: libc::c_int) {
        self.on_its_host(move |server| server.signal(signal));
    }

    /// Does something on the host and waits for it.
    pub fn on_its_host<T: Send + 'static>(&self, what: impl FnOnce(&mut testing::Postgres) -> T + Send + 'static) -> T {
        let (answer, answered) = channel();
        let task: Task = Box::new(move |server| answer.send(what(server)).unwrap());
        self.tasks.as_ref().unwrap().send(task).unwrap();
        answered.recv().unwrap()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        drop(self.tasks.take());
        // Its panic has been seen already, by whoever asked for something.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
