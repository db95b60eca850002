//! Calls that came twice. A guest that lost its connection sends again what it has no answer to; done again, a removal
//! would say that nothing is there.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};

use parking_lot::Mutex;

const KEPT: usize = 64;

/// The last answers to calls that are to be done once.
#[derive(Default)]
pub(crate) struct Repeats {
    /// Of a seed that no guest knows.
    state: RandomState,
    answers: Mutex<VecDeque<(u64, Vec<u8>)>>,
}

impl Repeats {
    /// Names a record: the call with its number, whom it is by, and all it says.
    pub fn key(&self, record: &[u8]) -> u64 {
        self.state.hash_one(record)
    }

    pub fn find(&self, key: u64) -> Option<Vec<u8>> {
        self.answers.lock().iter().find(|(k, _)| *k == key).map(|(_, answer)| answer.clone())
    }

    pub fn keep(&self, key: u64, answer: Vec<u8>) {
        let mut answers = self.answers.lock();
        if answers.len() == KEPT {
            answers.pop_front();
        }
        answers.push_back((key, answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_ones_are_kept() {
        let repeats = Repeats::default();
        for n in 0..KEPT as u8 + 1 {
            repeats.keep(repeats.key(&[n]), vec![n]);
        }
        assert_eq!(repeats.find(repeats.key(&[0])), None);
        assert_eq!(repeats.find(repeats.key(&[1])), Some(vec![1]));
        assert_eq!(repeats.find(repeats.key(&[KEPT as u8])), Some(vec![KEPT as u8]));
    }
}
