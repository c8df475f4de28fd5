//! A parsed prompt file becomes a batch of jobs, or is refused with its bad lines.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use farm_core::api::{CommitSubmission, LineError, SubmissionReply};
use farm_core::id::{JobId, SubmissionId};
use farm_core::job::prompt::{MAX_LINE_ERRORS, PromptFile};
use farm_core::job::spec::RenderRequest;
use uuid::Uuid;

use super::after::{self, Node, Outside};
use super::{Api, Failure, batches, jobs};
use crate::actor::Scheduler;
use crate::core::events::Ask;
use crate::core::resolve::{Keys, Models};
use crate::queue::store::{Batch, NewDependency, NewJob, Submission};

/// Endings of ids that are looked up for one file.
const MAX_ENDINGS: usize = 1000;
/// Kinds of clips that the farm is asked about at once.
const KINDS: usize = 64;

/// What decides whether a clip can ever be started.
type Kind = (Option<String>, Ask, Arc<BTreeMap<String, String>>);

/// A good line.
struct Line {
    line: u64,
    request: RenderRequest,
    model: Option<String>,
    key: [u8; 32],
    kind: usize,
}

/// The lines as they are written, and what has to be asked of others about them.
pub struct Draft {
    id: SubmissionId,
    submission: Submission,
    options: CommitSubmission,
    lines: Vec<Line>,
    nodes: Vec<Node>,
    kinds: Vec<Kind>,
    errors: Errors,
}

/// A draft with all answers.
pub struct Checked {
    draft: Draft,
    outside: Outside,
    /// What every line comes after.
    common: Vec<Uuid>,
    /// Why clips of each kind can never start.
    never: Vec<Option<String>>,
    max_queued: Option<u64>,
}

pub struct Prepared {
    pub batch: Batch,
    /// Jobs and batches of the farm that lines come after, each with the first such line.
    pub named: HashMap<Uuid, u64>,
}

/// The first bad lines of each check, and the number of all.
#[derive(Default)]
struct Errors {
    list: Vec<LineError>,
    lines: u64,
}

impl Errors {
    /// Of several checks, each keeps its own first ones.
    fn add(&mut self, kept: &mut usize, line: u64, reason: String) {
        self.lines += 1;
        if *kept < MAX_LINE_ERRORS {
            *kept += 1;
            self.list.push(LineError { line, column: 1, reason });
        }
    }

    fn finish(mut self) -> (Vec<LineError>, u64) {
        self.list.sort_by_key(|error| error.line);
        self.list.truncate(MAX_LINE_ERRORS);
        (self.list, self.lines)
    }
}

impl Draft {
    pub fn new(
        id: SubmissionId,
        file: PromptFile,
        submission: Submission,
        models: &Models,
        options: CommitSubmission,
    ) -> Result<Self, Failure> {
        let PromptFile { requests, errors, bad_lines } = file;
        let mut errors = Errors { list: errors, lines: bad_lines };
        let mut kept = 0;
        let mut keys = Keys::new(options.again.then_some(id), &submission.tenant);
        let mut lines = Vec::with_capacity(requests.len());
        let mut nodes = Vec::with_capacity(requests.len());
        let mut known: HashMap<Kind, usize> = HashMap::new();
        let mut kinds = Vec::new();
        for (line, request) in requests {
            let named = request.model.as_ref().or(submission.model.as_ref());
            let model = models
                .choose(named.map(String::as_str))
                .map_err(|error| Failure::refused(format!("line {line}: {error}")))?;
            let fits = models.check(&request, model.as_deref());
            let key = keys
                .key(&request, named.map(String::as_str))
                .map_err(|error| Failure::bad_request(format!("line {line}: {error}")))?;
            let after = request.after.clone();
            nodes.push(Node { line, id: request.id.clone(), after, bad: fits.is_err() });
            if let Err(reason) = fits {
                errors.add(&mut kept, line, reason);
            }
            let kind = (model.clone(), Ask::of(&request), Arc::new(request.require.clone()));
            let kind = *known.entry(kind).or_insert_with_key(|kind| {
                kinds.push(kind.clone());
                kinds.len() - 1
            });
            lines.push(Line { line, request, model, key, kind });
        }
        Ok(Self { id, submission, options, lines, nodes, kinds, errors })
    }

    /// Asks the store whom lines come after, and the farm what can never be.
    pub async fn check(self, api: &Api, scheduler: &Scheduler) -> Result<Checked, Failure> {
        let mut endings = 0;
        let mut outside = Outside::new();
        for entry in after::outside(&self.nodes) {
            let found = look_up(api, entry, &mut endings).await?;
            outside.insert(entry.to_owned(), found);
        }
        let mut common = Vec::new();
        for entry in &self.submission.after {
            common.push(look_up(api, entry, &mut endings).await?.map_err(Failure::refused)?);
        }
        let mut never = Vec::with_capacity(self.kinds.len());
        for kinds in self.kinds.chunks(KINDS) {
            let (kinds, tenant) = (kinds.to_vec(), self.submission.tenant.clone());
            let asked = scheduler.ask(move |farm| {
                let never = |(model, ask, require): &Kind| farm.never(&tenant, *ask, model.as_deref(), require);
                kinds.iter().map(never).collect::<Vec<_>>()
            });
            never.extend(asked.await?);
        }
        let tenant = self.submission.tenant.clone();
        let max_queued = scheduler.ask(move |farm| farm.max_queued(&tenant)).await?;
        Ok(Checked { draft: self, outside, common, never, max_queued })
    }
}

/// The job or batch of the farm that is meant. Whether there is one with a full id, the store checks when it commits.
async fn look_up(api: &Api, entry: &str, endings: &mut usize) -> Result<Result<Uuid, String>, Failure> {
    if let Ok(id) = entry.parse() {
        return Ok(Ok(id));
    }
    let is_ending = (jobs::MIN_ENDING..32).contains(&entry.len()) && entry.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_ending {
        return Ok(Err(format!("\"after\": no line, job or batch is called {entry:.80?}")));
    }
    *endings += 1;
    if *endings > MAX_ENDINGS {
        return Err(Failure::refused(format!("more than {MAX_ENDINGS} endings of ids; write whole ids")));
    }
    // One job at most, else it is not said which.
    match jobs::find(api, entry).await {
        Ok(job) => Ok(Ok(job.0)),
        Err(failure) if failure.is_not_found() => match batches::find(api, entry).await {
            Ok(batch) => Ok(Ok(batch.0)),
            Err(failure) if failure.is_not_found() => {
                Ok(Err(format!("\"after\": no line, job or batch is called {entry:?}")))
            }
            Err(failure) => failure.into_reason().map(Err),
        },
        Err(failure) => failure.into_reason().map(Err),
    }
}

impl Checked {
    /// Lines become jobs, or the file is refused.
    pub fn finish(self) -> Result<Prepared, Failure> {
        let Self { draft, outside, common, never, max_queued } = self;
        let Draft { id, submission, options, lines, mut nodes, mut errors, .. } = draft;
        let mut kept = 0;
        for (line, node) in lines.iter().zip(&mut nodes) {
            if let Some(reason) = &never[line.kind]
                && !node.bad
            {
                node.bad = true;
                errors.add(&mut kept, line.line, reason.clone());
            }
        }
        let (after, bad) = after::resolve(&nodes, &outside);
        let mut kept = 0;
        for (i, reason) in bad {
            nodes[i].bad = true;
            errors.add(&mut kept, nodes[i].line, reason);
        }
        let (errors, bad_lines) = errors.finish();
        if bad_lines > 0 && !options.skip_invalid {
            let lines = if bad_lines == 1 { "1 line is".to_owned() } else { format!("{bad_lines} lines are") };
            return Err(Failure::lines(format!("{lines} bad, nothing was queued"), errors, bad_lines));
        }
        let mut place = Vec::with_capacity(nodes.len());
        let mut good = 0;
        for node in &nodes {
            place.push(good);
            good += usize::from(!node.bad);
        }
        if good == 0 {
            return Err(Failure::lines("no good line, nothing was queued", errors, bad_lines));
        }
        let mut named = HashMap::new();
        let mut jobs = Vec::with_capacity(good);
        for ((line, after), node) in lines.into_iter().zip(after).zip(nodes) {
            if node.bad {
                continue;
            }
            let Line { line, request, model, key, .. } = line;
            let mut after: Vec<NewDependency> = after
                .into_iter()
                .map(|dependency| match dependency {
                    NewDependency::Line(at) => NewDependency::Line(place[at]),
                    NewDependency::Id(id) => {
                        named.entry(id).or_insert(line);
                        dependency
                    }
                })
                .collect();
            for id in &common {
                let dependency = NewDependency::Id(*id);
                if !after.contains(&dependency) {
                    after.push(dependency);
                }
            }
            // 32 bits: enough for any number of seeds, and short enough to type.
            let seed = request.seed.unwrap_or_else(|| rand::random::<u32>().into());
            let priority = request.priority.or(submission.priority).unwrap_or(0);
            jobs.push(NewJob { job: JobId::new(), key, request, seed, priority, model, after });
        }
        let reply = SubmissionReply {
            submission: id,
            new: 0,
            existing: 0,
            requeued: 0,
            lines: errors,
            bad_lines,
            waiting: None,
        };
        let Submission { tenant, max_failures, .. } = submission;
        Ok(Prepared { batch: Batch { submission: id, tenant, max_queued, max_failures, jobs, reply }, named })
    }
}
