//! A simulator of the whole farm around the real core: schedulers, a queue database, nodes and their devices, object
//! storage, a network and people, under random faults, in simulated time, all from one seed. After every step the twelve
//! invariants of [`audit`] are looked at. `docs/simulator.md` says what is simulated and how a schedule is replayed.
//!
//! | module | subject |
//! |---|---|
//! | [`runner`] | many schedules on several threads; one again, with its trace |
//! | [`plan`] | what a schedule is about, drawn from its seed |
//! | [`world`] | what is due when, and everything there is |
//! | [`scheduler`], [`store`] | a process around the core by the shell's rules; the database |
//! | [`node`], [`attempt`], [`hardware`] | a node's process; what its attempts do; its devices |
//! | [`net`], [`bucket`] | messages and connections; object storage |
//! | [`client`], [`faults`] | people; what goes wrong |
//! | [`settle`], [`audit`] | the end of a schedule; the invariants |

mod attempt;
mod audit;
mod bucket;
mod client;
mod faults;
mod hardware;
mod net;
mod node;
mod plan;
mod random;
pub mod runner;
mod scheduler;
mod settle;
mod store;
#[cfg(test)]
mod tests;
mod world;

/// Simulated milliseconds since the beginning.
pub type Ms = u64;
