//! What can go wrong, the hint that goes with it, and the exit status it ends in.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use farm_core::api::ApiError;
use miette::Diagnostic;

use crate::output::clean;

/// Everything a command can answer with besides an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Ok,
    /// A clip failed, was cancelled or could not be fetched.
    ClipFailed,
    /// Ctrl-C while waiting; the jobs go on.
    Interrupted,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> ExitCode {
        ExitCode::from(match status {
            Status::Ok => 0,
            Status::ClipFailed => 1,
            // As a shell reports a program ended by SIGINT.
            Status::Interrupted => 130,
        })
    }
}

#[derive(Debug, thiserror::Error, Diagnostic)]
pub enum Error {
    /// All addresses, each with what came of it.
    #[error("no scheduler answers at {tried}")]
    #[diagnostic(help(
        "start a farm on this machine with `farmctl up`, or a scheduler alone with `farm-scheduler --listen ADDR \
         --data DIR --store URL`; a farm elsewhere is named by --scheduler ADDR or FARM_SCHEDULER"
    ))]
    Unreachable { tried: String },

    #[error("what answers at {address} is not a farm scheduler of this version: {cause}")]
    #[diagnostic(help("check --scheduler, and that farmctl and farm-scheduler come from one build"))]
    NotAFarm { address: String, cause: String },

    #[error("farm-scheduler ended ({0})")]
    #[diagnostic(help("its last lines above say why"))]
    SchedulerEnded(String),

    /// The scheduler understood the request and said no.
    #[error("{}", clean(&answer.error))]
    Refused {
        /// HTTP status.
        status: u16,
        answer: ApiError,
        #[help]
        hint: Option<String>,
    },

    #[error("{message}")]
    Usage {
        message: String,
        #[help]
        help: Option<String>,
    },

    #[error("cannot {what} {}: {source}", path.display())]
    File { what: &'static str, path: PathBuf, source: io::Error },

    #[error("cannot write the output: {0}")]
    Output(io::Error),
}

impl Error {
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), help: None }
    }

    pub fn with_help(message: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Usage { message: message.into(), help: Some(help.into()) }
    }

    /// For `map_err`: what could not be done with which file.
    pub fn file(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { what, path: path.to_owned(), source }
    }

    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. } | Self::NotAFarm { .. } | Self::SchedulerEnded(_) => 3,
            Self::Refused { .. } | Self::Usage { .. } | Self::File { .. } | Self::Output(_) => 2,
        }
    }
}
