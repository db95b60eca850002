//! Tables for people, JSON for programs.

use chrono::{DateTime, Utc};
use comfy_table::{Table, presets};
use serde::Serialize;

/// How to print.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// JSON instead of tables.
    pub json: bool,
}

impl Output {
    /// One value as JSON.
    pub fn value(&self, value: &impl Serialize) -> anyhow::Result<()> {
        println!("{}", serde_json::to_string_pretty(value)?);
        Ok(())
    }

    /// Rows under a head; the sentence when there are none.
    pub fn table(&self, head: &[&str], rows: Vec<Vec<String>>, none: &str) {
        if rows.is_empty() {
            println!("{none}");
            return;
        }
        let mut table = Table::new();
        table.load_style(presets::NOTHING).set_header(head.iter().map(|h| h.to_uppercase()));
        for row in rows {
            table.add_row(row);
        }
        // Columns begin at the edge, and lines end with their text.
        for line in table.to_string().lines() {
            println!("{}", line.strip_prefix(' ').unwrap_or(line).trim_end());
        }
    }
}

/// `3m 5s ago`, `now`, `in 4m 2s`.
pub fn relative(time: DateTime<Utc>) -> String {
    let seconds = (time - Utc::now()).num_seconds();
    let text = duration(seconds.unsigned_abs());
    match seconds {
        ..0 => format!("{text} ago"),
        0 => "now".to_owned(),
        1.. => format!("in {text}"),
    }
}

/// `17 B`, `4.0 KiB`, `1.2 GiB`.
pub fn size(bytes: u64) -> String {
    let mut amount = bytes as f64;
    let mut units = ["B", "KiB", "MiB", "GiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    for larger in units.take_while(|_| bytes >= 1024) {
        if amount < 1024.0 {
            break;
        }
        (amount, unit) = (amount / 1024.0, larger);
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{amount:.1} {unit}") }
}

pub fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_two_parts() {
        assert_eq!(duration(5), "5s");
        assert_eq!(duration(185), "3m 5s");
        assert_eq!(duration(7_260), "2h 1m");
        assert_eq!(duration(180_000), "2d 2h");
    }
}
