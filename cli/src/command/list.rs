//! `farmctl list`

use farm_core::api::{JobPage, JobView};
use farm_core::job::state::JobState;

use crate::args::List;
use crate::client::{Client, JobQuery};
use crate::error::{Error, Status};
use crate::output::{self, cut};

/// Characters of a prompt in the table.
const PROMPT_CHARS: usize = 60;

pub async fn run(client: &Client, args: List) -> Result<Status, Error> {
    let submission = match &args.batch {
        Some(id) => Some(client.batch(id).await?.submission),
        None => None,
    };
    let mut query = JobQuery { state: args.state, submission, ..JobQuery::default() };
    let mut all = JobPage { jobs: Vec::new(), next: None };
    let mut pages = 0;
    loop {
        let page = client.jobs(query).await?;
        if args.output.json {
            all.jobs.extend(page.jobs);
        } else if !page.jobs.is_empty() || pages == 0 {
            let header = ["job", "id", "tenant", "state", "prio", "progress", "prompt"];
            output::line(&output::table(header, page.jobs.iter().map(row)))?;
        }
        pages += 1;
        match page.next {
            Some(next) => query.after = Some(next),
            None => break,
        }
    }
    if args.output.json {
        output::json(&all)?;
    }
    Ok(Status::Ok)
}

fn row(job: &JobView) -> [String; 7] {
    let progress = match (job.state, &job.progress) {
        (JobState::Running, Some(progress)) => output::progress(progress),
        _ => job.reason.clone().unwrap_or_default(),
    };
    [
        job.job.short(),
        job.id.clone().unwrap_or_default(),
        job.tenant.to_string(),
        job.state.as_str().to_owned(),
        job.priority.to_string(),
        cut(&progress, PROMPT_CHARS).into_owned(),
        cut(&job.prompt, PROMPT_CHARS).into_owned(),
    ]
}
