//! `farm-node model tokenize`: ids for lines on standard input.

use std::io::{self, BufRead, BufWriter, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use farm_core::model::tokenizer::{Tokenizer, TokenizerError};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder, or the tokenizer folder itself
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// A prompt line has at most this many bytes; so has a line here.
const MAX_LINE_BYTES: u64 = 64 * 1024;

pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let inner = args.dir.join("tokenizer");
    let tokenizer = match Tokenizer::open(&inner) {
        Err(TokenizerError::Absent { .. }) => Tokenizer::open(&args.dir)?,
        opened => opened?,
    };
    eprintln!("tokenizer: {}", tokenizer.path().display());
    encode_lines(&tokenizer, io::stdin().lock(), BufWriter::new(io::stdout().lock()))?;
    Ok(ExitCode::SUCCESS)
}

/// One line of ids, separated by spaces, for each line of `input`. Only `\n` ends a line; everything else is text.
fn encode_lines(tokenizer: &Tokenizer, mut input: impl BufRead, mut output: impl Write) -> anyhow::Result<()> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if (&mut input).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        anyhow::ensure!(line.len() as u64 <= MAX_LINE_BYTES, "line {number} is over {MAX_LINE_BYTES} bytes");
        let text = std::str::from_utf8(&line).with_context(|| format!("line {number} is not UTF-8"))?;
        let encoding = tokenizer.encode(text)?;
        if let Some(tokens) = encoding.truncated {
            eprintln!("line {number} has {tokens} tokens, the first {} are kept", encoding.ids.len() - 1);
        }
        let ids: Vec<String> = encoding.ids.iter().map(u32::to_string).collect();
        writeln!(output, "{}", ids.join(" "))?;
    }
    output.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_gives_one_line_of_ids_that_ends_with_the_end_token() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/mochi-tiny/tokenizer");
        let tokenizer = Tokenizer::open(dir.as_ref()).unwrap();
        let mut output = Vec::new();
        encode_lines(&tokenizer, &b"a red ball\n\na red ball"[..], &mut output).unwrap();
        let lines: Vec<&str> = std::str::from_utf8(&output).unwrap().lines().collect();
        assert_eq!((lines.len(), lines[0], lines[1]), (3, lines[2], "1"));
        assert!(lines[0].ends_with(" 1") && lines[0].split(' ').count() > 3, "{lines:?}");
    }
}
