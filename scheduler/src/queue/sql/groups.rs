//! Which changes can be made by one statement.

use std::collections::HashMap;

use farm_core::id::{JobId, NodeId, SubmissionId, TenantId};

use crate::core::effects::Change;
use crate::core::events::Scope;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Started,
    AttemptEnded,
    Done,
    Requeued,
    Counted,
    Failed,
    Cancelled,
    Retried,
    Paused,
    Drained,
    Tenant,
    Audit,
    Log,
}

/// What a change is about. Changes of different subjects may be made in any order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Subject<'a> {
    Job(JobId),
    Batch(SubmissionId),
    Tenant(&'a TenantId),
    Node(&'a NodeId),
    Farm,
}

/// Lines of logs and of the audit trail are about nothing that a change could alter: all of them can be written together.
fn sort(change: &Change) -> (Kind, Option<Subject<'_>>) {
    let job = |job: &JobId| Some(Subject::Job(*job));
    match change {
        Change::Started { start, .. } => (Kind::Started, job(&start.key.job)),
        Change::AttemptEnded { key, .. } => (Kind::AttemptEnded, job(&key.job)),
        Change::Done { job: id, .. } => (Kind::Done, job(id)),
        Change::Requeued { job: id, .. } => (Kind::Requeued, job(id)),
        Change::Counted { job: id, .. } => (Kind::Counted, job(id)),
        Change::Failed { job: id, .. } => (Kind::Failed, job(id)),
        Change::Cancelled { job: id } => (Kind::Cancelled, job(id)),
        Change::Retried { job: id } => (Kind::Retried, job(id)),
        Change::Paused { scope, .. } => {
            let subject = match scope {
                Scope::Farm => Subject::Farm,
                Scope::Tenant(tenant) => Subject::Tenant(tenant),
                Scope::Batch(batch) => Subject::Batch(*batch),
                Scope::Job(id) => Subject::Job(*id),
            };
            (Kind::Paused, Some(subject))
        }
        Change::Drained { node, .. } => (Kind::Drained, Some(Subject::Node(node))),
        Change::Tenant { tenant, .. } => (Kind::Tenant, Some(Subject::Tenant(tenant))),
        Change::Audit { .. } => (Kind::Audit, None),
        Change::Log { .. } => (Kind::Log, None),
    }
}

/// The changes in as few groups of one kind as their order allows: made group by group, they come to the same as made one by
/// one. No group has two changes of one subject.
pub(super) fn groups(changes: &[Change]) -> Vec<(Kind, Vec<&Change>)> {
    let mut groups: Vec<(Kind, Vec<&Change>)> = Vec::new();
    let mut of_kind: HashMap<Kind, Vec<usize>> = HashMap::new();
    // The first group that a subject's next change may be in.
    let mut next: HashMap<Subject<'_>, usize> = HashMap::new();
    for change in changes {
        let (kind, subject) = sort(change);
        let first = subject.and_then(|subject| next.get(&subject).copied()).unwrap_or(0);
        let known = of_kind.entry(kind).or_default();
        let group = match known.get(known.partition_point(|group| *group < first)) {
            Some(group) => *group,
            None => {
                known.push(groups.len());
                groups.push((kind, Vec::new()));
                groups.len() - 1
            }
        };
        groups[group].1.push(change);
        if let Some(subject) = subject {
            next.insert(subject, group + 1);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use farm_core::id::AttemptNo;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn id(n: u8) -> JobId {
        JobId(Uuid::from_u128(n.into()))
    }

    fn change(kind: u8, n: u8) -> Change {
        let job = id(n);
        match kind {
            0 => Change::Failed { job, reason: String::new() },
            1 => Change::Cancelled { job },
            2 => Change::Retried { job },
            3 => Change::Requeued { job, counts: Default::default() },
            4 => Change::Paused { scope: Scope::Job(job), paused: true },
            5 => Change::Paused { scope: Scope::Farm, paused: true },
            _ => Change::Log { job, attempt: Some(AttemptNo(1)), line: String::new() },
        }
    }

    proptest! {
        #[test]
        fn groups_keep_the_order_of_each_subject(drawn in prop::collection::vec((0u8..7, 0u8..4), 0..60)) {
            let changes: Vec<Change> = drawn.into_iter().map(|(kind, n)| change(kind, n)).collect();
            let groups = groups(&changes);
            let flat: Vec<&Change> = groups.iter().flat_map(|(_, group)| group.iter().copied()).collect();
            prop_assert_eq!(flat.len(), changes.len());
            for change in &changes {
                let (kind, subject) = sort(change);
                let of = |other: &&&Change| sort(other).1 == subject && (subject.is_some() || sort(other).0 == kind);
                let before: Vec<*const Change> = changes.iter().collect::<Vec<_>>().iter().filter(of).map(|c| *c as *const _).collect();
                let after: Vec<*const Change> = flat.iter().filter(of).map(|c| *c as *const _).collect();
                prop_assert_eq!(before, after);
            }
            for (kind, group) in &groups {
                let mut subjects: Vec<_> = group.iter().filter_map(|change| sort(change).1).collect();
                prop_assert!(group.iter().all(|change| sort(change).0 == *kind));
                let count = subjects.len();
                subjects.sort_by_key(|subject| format!("{subject:?}"));
                subjects.dedup();
                prop_assert_eq!(subjects.len(), count);
            }
        }
    }

    #[test]
    fn the_work_of_many_jobs_takes_as_many_groups_as_that_of_one() {
        let changes: Vec<Change> = (0..100).flat_map(|n| [6, 3, 1].map(|kind| change(kind, n))).collect();
        let kinds: Vec<Kind> = groups(&changes).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Kind::Log, Kind::Requeued, Kind::Cancelled]);
    }
}
