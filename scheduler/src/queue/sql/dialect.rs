//! The little in which SQLite's and Postgres' SQL differ.

use std::fmt::Write;

/// Everything else is written once. Placeholders are `$1`, `$2`, …, which both understand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Sqlite,
    Postgres,
}

/// How a value of [`Dialect::rows`] is read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Column {
    Text(&'static str),
    Integer(&'static str),
    Real(&'static str),
}

impl Dialect {
    /// A table out of the parameter `$1`, a JSON array of arrays: one statement takes any number of rows, and its text
    /// stays the same. `ord` numbers them.
    pub(super) fn rows(self, columns: &[Column]) -> String {
        let mut select = String::from("(SELECT ");
        for (i, column) in columns.iter().enumerate() {
            let (name, kind) = match *column {
                Column::Text(name) => (name, "TEXT"),
                Column::Integer(name) => (name, "BIGINT"),
                Column::Real(name) => (name, "DOUBLE PRECISION"),
            };
            // Writing to a string cannot fail.
            let _ = match self {
                Self::Sqlite => write!(select, "json_extract(r.value, '$[{i}]') AS {name}, "),
                Self::Postgres => write!(select, "CAST(r.value ->> {i} AS {kind}) AS {name}, "),
            };
        }
        select.push_str(match self {
            Self::Sqlite => "r.key AS ord FROM json_each($1) AS r)",
            Self::Postgres => "r.ord FROM jsonb_array_elements(CAST($1 AS JSONB)) WITH ORDINALITY AS r (value, ord))",
        });
        select
    }

    /// Ends a `SELECT` of a row that nobody else may change until the transaction ends. SQLite's writers are alone anyway.
    pub(super) fn for_update(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " FOR UPDATE",
        }
    }

    /// Likewise, but others may hold the row in the same way.
    pub(super) fn for_share(self) -> &'static str {
        match self {
            Self::Sqlite => "",
            Self::Postgres => " FOR SHARE",
        }
    }

    /// Whether a column has one of some words, none of which is part of another, for rows that are found by their keys. Said
    /// plainly, either planner would rather walk along an index of all rows that have the word, and compare each of them
    /// with each key: it does not know that there are many.
    pub(super) fn is_one_of(self, column: &str, words: &[&str]) -> String {
        let one = |word: &&str| match self {
            Self::Sqlite => format!("+{column} = '{word}'"),
            Self::Postgres => format!("strpos({column}, '{word}') > 0"),
        };
        format!("({})", words.iter().map(one).collect::<Vec<_>>().join(" OR "))
    }

    /// Waits for all other transactions that have said this. SQLite's writers are alone anyway.
    pub(super) fn one_at_a_time(self) -> Option<&'static str> {
        match self {
            Self::Sqlite => None,
            // "farm", and the next number after the leader's.
            Self::Postgres => Some("SELECT CAST(COUNT(pg_advisory_xact_lock(1717662317, 2)) AS BIGINT) AS waited"),
        }
    }

    /// Begins a transaction that writes.
    pub(super) fn begin_write(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN",
        }
    }

    /// Begins a transaction whose reads all see one moment.
    pub(super) fn begin_read(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN",
            Self::Postgres => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
        }
    }

    /// The store's own clock, in milliseconds since 1970.
    pub(super) fn now_ms(self) -> &'static str {
        match self {
            Self::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
            Self::Postgres => "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
        }
    }
}
