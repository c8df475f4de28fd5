//! What the lines of a file come after: names of other lines, ids of jobs and batches, and no circles.

use std::collections::HashMap;

use uuid::Uuid;

use crate::queue::store::NewDependency;

/// Why a line cannot be.
pub type Bad = (usize, String);

/// What an entry of `after` that is no line's name stands for, by what was written.
pub type Outside = HashMap<String, Result<Uuid, String>>;

/// A line as far as its place in the order goes.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Its number in the file.
    pub line: u64,
    /// Its own name.
    pub id: Option<String>,
    pub after: Vec<String>,
    /// It is refused for another reason.
    pub bad: bool,
}

/// The entries that are no names of lines, each once.
pub fn outside<'a>(nodes: &'a [Node]) -> Vec<&'a str> {
    let names: std::collections::HashSet<&str> = nodes.iter().filter_map(|node| node.id.as_deref()).collect();
    let mut entries: Vec<&'a str> =
        nodes.iter().flat_map(|node| &node.after).map(String::as_str).filter(|entry| !names.contains(entry)).collect();
    entries.sort_unstable();
    entries.dedup();
    entries
}

/// What each line comes after, by the lines' places in `nodes`, and the lines that cannot be, in order of their places. A
/// line is bad if it names what there is not, if it is of a circle or comes after one, and if it comes after a bad line.
pub fn resolve(nodes: &[Node], outside: &Outside) -> (Vec<Vec<NewDependency>>, Vec<Bad>) {
    let names: HashMap<&str, usize> =
        nodes.iter().enumerate().filter_map(|(i, node)| Some((node.id.as_deref()?, i))).collect();
    let mut after = Vec::with_capacity(nodes.len());
    let mut why: Vec<Option<String>> = vec![None; nodes.len()];
    for (i, node) in nodes.iter().enumerate() {
        let mut of = Vec::with_capacity(node.after.len());
        for entry in &node.after {
            let found = match names.get(entry.as_str()) {
                Some(line) => Ok(NewDependency::Line(*line)),
                None => match outside.get(entry) {
                    Some(Ok(id)) => Ok(NewDependency::Id(*id)),
                    Some(Err(reason)) => Err(reason.clone()),
                    None => Err(format!("\"after\": no line, job or batch is called {entry:.80?}")),
                },
            };
            match found {
                Ok(dependency) if of.contains(&dependency) => {}
                Ok(dependency) => of.push(dependency),
                Err(reason) => _ = why[i].get_or_insert(reason),
            }
        }
        after.push(of);
    }
    let ordered = order(&after);
    // Dependencies come first, so one pass spreads what is bad.
    for i in ordered.iter().copied() {
        if why[i].is_some() || nodes[i].bad {
            continue;
        }
        let spoilt = lines_of(&after[i]).find(|line| nodes[*line].bad || why[*line].is_some());
        why[i] = spoilt.map(|line| format!("\"after\": line {} cannot be queued", nodes[line].line));
    }
    let mut placed = vec![false; nodes.len()];
    for i in ordered {
        placed[i] = true;
    }
    for i in (0..nodes.len()).filter(|i| !placed[*i]) {
        why[i] = Some(String::new());
    }
    // The words are long, and only the first are shown.
    let told = |i: usize, reason: String| if placed[i] { reason } else { circle(nodes, &after, &placed, i) };
    let bad: Vec<usize> = (0..nodes.len()).filter(|i| why[*i].is_some() && !nodes[*i].bad).collect();
    let bad = bad.into_iter().enumerate().map(|(n, i)| {
        let reason = why[i].take().unwrap_or_default();
        (i, if n < farm_core::job::prompt::MAX_LINE_ERRORS { told(i, reason) } else { String::new() })
    });
    let bad = bad.collect();
    (after, bad)
}

fn lines_of(after: &[NewDependency]) -> impl Iterator<Item = usize> {
    after.iter().filter_map(|dependency| match dependency {
        NewDependency::Line(line) => Some(*line),
        NewDependency::Id(_) => None,
    })
}

/// The lines that are in no circle and behind none, each behind what it comes after.
fn order(after: &[Vec<NewDependency>]) -> Vec<usize> {
    let mut before: Vec<Vec<usize>> = vec![Vec::new(); after.len()];
    let mut open: Vec<usize> = vec![0; after.len()];
    for (i, of) in after.iter().enumerate() {
        for line in lines_of(of) {
            before[line].push(i);
            open[i] += 1;
        }
    }
    let mut ordered: Vec<usize> = (0..after.len()).filter(|i| open[*i] == 0).collect();
    let mut next = 0;
    while let Some(done) = ordered.get(next).copied() {
        next += 1;
        for i in std::mem::take(&mut before[done]) {
            open[i] -= 1;
            if open[i] == 0 {
                ordered.push(i);
            }
        }
    }
    ordered
}

/// The circle that the line is in, or that it comes after, in words.
fn circle(nodes: &[Node], after: &[Vec<NewDependency>], placed: &[bool], from: usize) -> String {
    const SHOWN: usize = 8;
    let mut seen: HashMap<usize, usize> = HashMap::new();
    let mut path = Vec::new();
    let mut at = from;
    while !seen.contains_key(&at) {
        seen.insert(at, path.len());
        path.push(at);
        // Each line that has no place comes after another such.
        let Some(next) = lines_of(&after[at]).find(|line| !placed[*line]) else { break };
        at = next;
    }
    let begin = seen.get(&at).copied().unwrap_or(0);
    let lines: Vec<String> = path[begin..].iter().map(|i| nodes[*i].line.to_string()).collect();
    let shown = match lines.len() {
        1 => return format!("\"after\": line {} comes after itself", lines[0]),
        more if more > SHOWN => format!("{}, … ({more} lines)", lines[..SHOWN].join(", ")),
        _ => lines.join(", "),
    };
    if begin == 0 {
        format!("\"after\": lines {shown} come after each other in a circle")
    } else {
        format!("\"after\": it comes after lines {shown}, which come after each other in a circle")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(line: u64, id: &str, after: &[&str]) -> Node {
        let after = after.iter().map(ToString::to_string).collect();
        Node { line, id: Some(id.to_owned()), after, bad: false }
    }

    #[test]
    fn names_of_lines_go_before_ids_and_what_is_unknown_is_bad() {
        let id = Uuid::from_u128(7);
        let text = id.simple().to_string();
        let nodes =
            [node(1, "a", &["b", "b", &text]), node(2, "b", &[]), node(3, "c", &["nowhere"]), node(4, "d", &["c"])];
        assert_eq!(outside(&nodes), [text.as_str(), "nowhere"]);
        let found = Outside::from([(text, Ok(id)), ("nowhere".to_owned(), Err("there is none".to_owned()))]);
        let (after, bad) = resolve(&nodes, &found);
        assert_eq!(after[0], [NewDependency::Line(1), NewDependency::Id(id)]);
        let words: Vec<_> = bad.iter().map(|(i, reason)| (*i, reason.as_str())).collect();
        assert_eq!(words, [(2, "there is none"), (3, "\"after\": line 3 cannot be queued")]);
    }

    #[test]
    fn circles_are_told_by_their_lines() {
        let nodes = [
            node(1, "a", &["c"]),
            node(2, "b", &["a"]),
            node(3, "c", &["b"]),
            node(4, "d", &["c"]),
            node(5, "e", &["e"]),
            node(6, "f", &[]),
        ];
        let (_, bad) = resolve(&nodes, &Outside::new());
        let words: Vec<_> = bad.iter().map(|(i, reason)| (*i, reason.as_str())).collect();
        assert_eq!(
            words,
            [
                (0, "\"after\": lines 1, 3, 2 come after each other in a circle"),
                (1, "\"after\": lines 2, 1, 3 come after each other in a circle"),
                (2, "\"after\": lines 3, 2, 1 come after each other in a circle"),
                (3, "\"after\": it comes after lines 3, 2, 1, which come after each other in a circle"),
                (4, "\"after\": line 5 comes after itself"),
            ]
        );
    }

    proptest! {
        /// A line is good exactly if nothing that it comes after, however far, is bad or comes after itself.
        #[test]
        fn what_is_good_can_be_done_in_some_order(
            edges in proptest::collection::vec(proptest::collection::vec(0usize..12, 0..3), 12),
            spoilt in proptest::collection::vec(proptest::bool::weighted(0.1), 12),
        ) {
            let nodes: Vec<Node> = edges.iter().zip(&spoilt).enumerate().map(|(i, (of, bad))| Node {
                line: i as u64 + 1,
                id: Some(i.to_string()),
                after: of.iter().map(ToString::to_string).collect(),
                bad: *bad,
            }).collect();
            let mut reach = vec![vec![false; 12]; 12];
            for (i, of) in edges.iter().enumerate() {
                of.iter().for_each(|j| reach[i][*j] = true);
            }
            for k in 0..12 { for i in 0..12 { for j in 0..12 {
                reach[i][j] |= reach[i][k] && reach[k][j];
            }}}
            let (after, bad) = resolve(&nodes, &Outside::new());
            let is_bad: Vec<bool> = (0..12).map(|i| spoilt[i] || bad.iter().any(|(b, _)| *b == i)).collect();
            for i in 0..12 {
                let wrong = reach[i][i] || (0..12).any(|j| reach[i][j] && (reach[j][j] || spoilt[j]));
                prop_assert_eq!(is_bad[i], spoilt[i] || wrong, "line {}", i);
                if !is_bad[i] {
                    prop_assert!(lines_of(&after[i]).all(|j| !is_bad[j]));
                }
            }
        }
    }
}
