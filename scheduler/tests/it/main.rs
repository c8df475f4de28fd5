//! The scheduler from outside: over HTTP on a real port, and as a process that is killed and started again.

mod api;
mod pair;
mod process;
mod refuse;
mod submit;
mod support;
mod wishes;
