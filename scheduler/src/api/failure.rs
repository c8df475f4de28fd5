//! Every failed call is answered with a status and an [`ApiError`].

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use farm_core::api::{ApiError, LineError};
use farm_core::store::artifact::StoreError;

use crate::actor::{CallError, Refusal};
use crate::gc::GcError;
use crate::queue::store::QueueError;

#[derive(Debug)]
pub struct Failure {
    status: StatusCode,
    error: ApiError,
}

impl Failure {
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self { status, error: ApiError { error: error.into(), lines: Vec::new(), bad_lines: 0, leader: None } }
    }

    pub fn is_not_found(&self) -> bool {
        self.status == StatusCode::NOT_FOUND
    }

    /// In words, if it is the caller's own.
    pub fn into_reason(self) -> Result<String, Self> {
        if self.status.is_client_error() { Ok(self.error.error) } else { Err(self) }
    }

    pub fn bad_request(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    pub fn not_found(error: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, error)
    }

    pub fn conflict(error: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, error)
    }

    /// A refused submission.
    pub fn lines(error: impl Into<String>, lines: Vec<LineError>, bad_lines: u64) -> Self {
        let status = StatusCode::UNPROCESSABLE_ENTITY;
        Self { status, error: ApiError { error: error.into(), lines, bad_lines, leader: None } }
    }

    /// What was asked for makes sense, but cannot be.
    pub fn refused(error: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, error)
    }

    /// This scheduler does not lead.
    pub fn stands_by(leader: Option<String>) -> Self {
        let error = match &leader {
            Some(leader) => format!("this scheduler stands by; ask {leader}"),
            None => "no scheduler leads at the moment; try again".to_owned(),
        };
        let mut failure = Self::new(StatusCode::SERVICE_UNAVAILABLE, error);
        failure.error.leader = leader;
        failure
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        match error {
            QueueError::TooManySubmissions(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, error.to_string()),
            QueueError::Refused(reason) => Self::refused(reason),
            QueueError::Superseded(_) | QueueError::Timeout(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string())
            }
            error => {
                tracing::error!(%error, "a call failed");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
            }
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => Self::not_found(error.to_string()),
            error => Self::new(StatusCode::BAD_GATEWAY, error.to_string()),
        }
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unknown(_) => Self::not_found(refusal.to_string()),
            Refusal::State { .. } => Self::conflict(refusal.to_string()),
            Refusal::Early(_) => Self::new(StatusCode::SERVICE_UNAVAILABLE, refusal.to_string()),
        }
    }
}

impl From<GcError> for Failure {
    fn from(error: GcError) -> Self {
        match error {
            GcError::Call(error) => error.into(),
            GcError::Queue(error) => error.into(),
        }
    }
}
