//! Progress of a build, as people know it from BuildKit.

use std::io::IsTerminal;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use crate::output::Output;

/// Lines of a failed step that are shown again.
const SHOWN: usize = 20;

/// What is shown of a build that is at work.
pub struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    step: String,
    title: String,
    began: Instant,
    output: Vec<String>,
}

impl Progress {
    pub fn new(out: Output) -> Self {
        let bar = (!out.json && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(ProgressStyle::default_spinner());
            bar.enable_steady_tick(std::time::Duration::from_millis(120));
            bar
        });
        let (step, title) = (String::new(), String::new());
        Self { bar, quiet: out.json, step, title, began: Instant::now(), output: Vec::new() }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if self.quiet => {}
            None => eprintln!("{text}"),
        }
    }

    /// One entry of the log.
    pub fn entry(&mut self, entry: &Value) {
        let text = entry["message"].as_str().unwrap_or_default();
        let step = entry["step"].as_str().unwrap_or_default();
        if step != self.step {
            (self.step, self.title, self.began) = (step.to_owned(), String::new(), Instant::now());
            self.output.clear();
        }
        // On a terminal a step is one line; elsewhere each line is on its own, with the step in front.
        let plain = self.bar.is_none();
        if let Some(title) = text.strip_prefix("CACHED ") {
            self.say(&if plain {
                format!("#{step} {title}\n#{step} CACHED")
            } else {
                format!(" => CACHED {title}")
            });
        } else if let Some(time) = text.strip_prefix("DONE ") {
            let time = time.replace(' ', "");
            self.say(&if plain {
                format!("#{step} DONE {time}")
            } else {
                format!(" => {}  {time}", self.title)
            });
            self.title.clear();
        } else if self.title.is_empty() && entry["level"] != "error" {
            self.title = text.to_owned();
            if plain {
                self.say(&format!("#{step} {text}"));
            }
        } else {
            self.output.push(text.to_owned());
            if plain {
                self.say(&format!("#{step} {:.1} {text}", self.began.elapsed().as_secs_f64()));
            }
        }
        if let Some(bar) = &self.bar {
            let last = self.output.last().map(|l| format!(" | {l}")).unwrap_or_default();
            let line: String = format!("{}{last}", self.title).chars().take(100).collect();
            bar.set_message(line);
        }
    }

    /// Shows what the step that failed said.
    pub fn failed(&self) {
        if self.bar.is_some() {
            self.say(&format!(" => ERROR {}", self.title));
            self.say("------");
            for line in &self.output[self.output.len().saturating_sub(SHOWN)..] {
                self.say(&format!(" > {line}"));
            }
            self.say("------");
        }
    }

    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
