//! Two curves for each policy: which part of the requests, and of the tenants, has waited no longer than so long.

use std::fmt::Write;

use super::super::report::quantile;
use super::replay::{Outcome, Policy};

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 50.0;
/// Between the panels.
const GAP: f64 = 70.0;
/// Seconds at the left and right end; the axis is logarithmic.
const SECONDS: (f64, f64) = (0.1, 10_000.0);
const POINTS: usize = 200;

/// What a panel shows of an outcome, sorted.
type Values = fn(&Outcome) -> &[f64];

pub fn svg(title: &str, outcomes: &[Outcome]) -> String {
    let (width, height) = (LEFT + 2.0 * WIDTH + GAP + 20.0, TOP + HEIGHT + 70.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{title}: waits until start</text>\n"
    );
    let panels: [(&str, Values); 2] = [
        ("part of the requests", |outcome| &outcome.waits),
        ("part of the tenants, by mean wait", |outcome| &outcome.tenants),
    ];
    for (i, (name, values)) in panels.into_iter().enumerate() {
        let left = LEFT + i as f64 * (WIDTH + GAP);
        panel(&mut svg, left, name);
        for (n, outcome) in outcomes.iter().enumerate() {
            curve(&mut svg, left, outcome.policy, values(outcome));
            if i == 0 {
                let (x, y) = (LEFT + n as f64 * 150.0, TOP + HEIGHT + 58.0);
                let colour = colour(outcome.policy);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{x}\" y=\"{}\" width=\"14\" height=\"4\" fill=\"{colour}\"/><text x=\"{}\" y=\"{y}\">{}</text>",
                    y - 6.0,
                    x + 20.0,
                    outcome.policy.name()
                );
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn colour(policy: Policy) -> &'static str {
    match policy {
        Policy::Fifo => "#888888",
        Policy::Oracle => "#1b7fbd",
        Policy::Own => "#d1495b",
    }
}

fn x(left: f64, seconds: f64) -> f64 {
    let part = (seconds.clamp(SECONDS.0, SECONDS.1) / SECONDS.0).ln() / (SECONDS.1 / SECONDS.0).ln();
    left + WIDTH * part
}

fn panel(svg: &mut String, left: f64, name: &str) {
    let bottom = TOP + HEIGHT;
    let _ = writeln!(svg, "<text x=\"{left}\" y=\"{}\">{name}</text>", TOP - 8.0);
    for i in 0..=4 {
        let (part, y) = (i * 25, bottom - HEIGHT * f64::from(i) / 4.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {y}h{WIDTH}\" stroke=\"#dddddd\"/><text x=\"{}\" y=\"{}\" text-anchor=\"end\">{part} %</text>",
            left - 6.0,
            y + 4.0
        );
    }
    for seconds in [0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0] {
        let x = x(left, seconds);
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}v{HEIGHT}\" stroke=\"#dddddd\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{seconds} s</text>",
            bottom + 18.0
        );
    }
}

fn curve(svg: &mut String, left: f64, policy: Policy, sorted: &[f64]) {
    let points: Vec<String> = (0..=POINTS)
        .map(|i| {
            let part = i as f64 / POINTS as f64;
            format!("{:.1},{:.1}", x(left, quantile(sorted, part)), TOP + HEIGHT * (1.0 - part))
        })
        .collect();
    let _ = writeln!(
        svg,
        "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"2\" points=\"{}\"/>",
        colour(policy),
        points.join(" ")
    );
}
