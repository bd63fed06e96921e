//! Output of the command line: tables for people, JSON for scripts. Knows no column by name.

use serde::Serialize;
use std::fmt;
use std::io::{self, Write};

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// Columns for people.
    #[default]
    Table,
    /// JSON for scripts.
    Json,
}

/// Rows under headings.
#[derive(Clone, Debug, Default)]
pub struct Table {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    bordered: bool,
}

impl Table {
    /// A table with these headings and no row.
    pub fn new(head: &[&str]) -> Self {
        Self {
            head: head.iter().map(|&h| h.to_owned()).collect(),
            ..Self::default()
        }
    }
    /// Draw lines between cells.
    #[must_use]
    pub fn bordered(mut self) -> Self {
        self.bordered = true;
        self
    }
    /// Append a row; missing cells are empty.
    pub fn row<C: Into<String>>(&mut self, cells: impl IntoIterator<Item = C>) -> &mut Self {
        let mut row: Vec<String> = cells.into_iter().map(Into::into).collect();
        row.resize(self.head.len(), String::new());
        self.rows.push(row);
        self
    }

    fn widths(&self) -> Vec<usize> {
        let lines = std::iter::once(&self.head).chain(&self.rows);
        lines.fold(vec![0; self.head.len()], |mut widths, line| {
            for (width, cell) in widths.iter_mut().zip(line) {
                *width = (*width).max(cell.chars().count());
            }
            widths
        })
    }

    fn plain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        for line in std::iter::once(&self.head).chain(&self.rows) {
            let cells = line
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!("{cell:<width$}"));
            writeln!(f, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
        }
        Ok(())
    }

    fn lined(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths = self.widths();
        let dashes: Vec<String> = widths.iter().map(|w| "-".repeat(w + 2)).collect();
        let rule = format!("+{}+", dashes.join("+"));
        writeln!(f, "{rule}")?;
        for (n, line) in std::iter::once(&self.head).chain(&self.rows).enumerate() {
            let cells = line
                .iter()
                .zip(&widths)
                .map(|(cell, &width)| format!(" {cell:<width$} "));
            writeln!(f, "|{}|", cells.collect::<Vec<_>>().join("|"))?;
            if n == 0 {
                writeln!(f, "{rule}")?;
            }
        }
        if !self.rows.is_empty() {
            writeln!(f, "{rule}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bordered {
            self.lined(f)
        } else {
            self.plain(f)
        }
    }
}

/// Print `data` as JSON, or the table that `table` makes of it.
pub fn emit<T: Serialize>(
    output: Output,
    data: &T,
    table: impl FnOnce(&T) -> Table,
) -> io::Result<()> {
    let text = match output {
        Output::Json => format!("{}\n", serde_json::to_string_pretty(data)?),
        Output::Table => table(data).to_string(),
    };
    io::stdout().lock().write_all(text.as_bytes())
}

/// Print one line to standard output.
pub fn line(text: &str) -> io::Result<()> {
    writeln!(io::stdout().lock(), "{text}")
}

/// An age in the largest unit that fits: `45s`, `12m`, `3h`, `5d`.
pub fn age(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..120 => format!("{s}s"),
        120..7_200 => format!("{}m", s / 60),
        7_200..172_800 => format!("{}h", s / 3600),
        _ => format!("{}d", s / 86_400),
    }
}

/// A size in binary units: `512 B`, `1.5 GiB`.
pub fn bytes(n: u64) -> String {
    let mut unit = "B";
    let mut scaled = n as f64;
    for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = next;
    }
    if unit == "B" {
        format!("{n} B")
    } else {
        format!("{scaled:.1} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row(["1", "a"]).row(["22", "größer"]).row(["3"]);
        assert_eq!(table.to_string(), "ID  NAME\n1   a\n22  größer\n3\n");
        let drawn = "+----+--------+\n| ID | NAME   |\n+----+--------+\n| 1  | a      |\n\
                     | 22 | größer |\n| 3  |        |\n+----+--------+\n";
        assert_eq!(table.bordered().to_string(), drawn);
        assert_eq!(Table::new(&["ID"]).to_string(), "ID\n");
    }

    #[test]
    fn figures_read_well() {
        assert_eq!([age(0), age(119_000), age(120_000)], ["0s", "119s", "2m"]);
        assert_eq!([age(7_200_000), age(172_800_000)], ["2h", "2d"]);
        assert_eq!(
            [bytes(0), bytes(1023), bytes(1536)],
            ["0 B", "1023 B", "1.5 KiB"]
        );
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
    }
}
