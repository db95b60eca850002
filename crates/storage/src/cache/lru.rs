//! A map that knows how many bytes its entries take and which was used longest ago.

use std::{
    collections::BTreeMap,
    ops::{Bound, RangeInclusive},
};

/// Entries by key. Those that are held are never the oldest.
#[derive(Debug)]
pub(crate) struct Lru<K, V> {
    entries: BTreeMap<K, Entry<V>>,
    /// The keys of the entries that are not held, by when they were last used.
    order: BTreeMap<u64, K>,
    clock: u64,
    used: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    size: u64,
    /// `None` while it is held.
    used_at: Option<u64>,
}

impl<K: Ord + Copy, V> Lru<K, V> {
    pub fn new() -> Self {
        Self { entries: BTreeMap::new(), order: BTreeMap::new(), clock: 0, used: 0 }
    }

    /// How many bytes all entries take.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// Puts an entry in, as the one used last, in place of an earlier one of its key.
    pub fn insert(&mut self, key: K, value: V, size: u64, held: bool) {
        self.remove(&key);
        let used_at = (!held).then(|| self.tick(key));
        self.entries.insert(key, Entry { value, size, used_at });
        self.used += size;
    }

    /// Whether there is one; that is no use of it.
    pub fn contains(&self, key: &K) -> bool {
        self.entries.contains_key(key)
    }

    /// The entry, which is then the one used last.
    pub fn get(&mut self, key: &K) -> Option<&V> {
        if let Some(at) = self.entries.get(key)?.used_at {
            self.order.remove(&at);
            let now = self.tick(*key);
            self.entries.get_mut(key)?.used_at = Some(now);
        }
        self.entries.get(key).map(|e| &e.value)
    }

    pub fn remove(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.remove(key)?;
        if let Some(at) = entry.used_at {
            self.order.remove(&at);
        }
        self.used -= entry.size;
        Some(entry.value)
    }

    pub fn remove_all(&mut self, range: RangeInclusive<K>) {
        let keys: Vec<K> = self.keys(range).collect();
        for key in keys {
            self.remove(&key);
        }
    }

    /// Takes out the entry that was used longest ago; `None` if all that are left are held.
    pub fn evict(&mut self) -> Option<(K, V)> {
        let (_, key) = self.order.pop_first()?;
        let entry = self.entries.remove(&key)?;
        self.used -= entry.size;
        Some((key, entry.value))
    }

    /// The keys in a range, in ascending order.
    pub fn keys(&self, range: RangeInclusive<K>) -> impl Iterator<Item = K> + '_ {
        self.entries.range((Bound::Included(*range.start()), Bound::Included(*range.end()))).map(|(k, _)| *k)
    }

    /// Holds all entries in a range, or lets go of them.
    pub fn hold(&mut self, range: RangeInclusive<K>, held: bool) {
        let keys: Vec<K> = self.keys(range).collect();
        for key in keys {
            let used_at = (!held).then(|| self.tick(key));
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            if let Some(before) = std::mem::replace(&mut entry.used_at, used_at) {
                self.order.remove(&before);
            }
        }
    }

    fn tick(&mut self, key: K) -> u64 {
        self.clock += 1;
        self.order.insert(self.clock, key);
        self.clock
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Op {
        Insert(u8, u64),
        Get(u8),
        Remove(u8),
        Evict,
        Hold(u8, u8, bool),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..12u8, 0..50u64).prop_map(|(k, s)| Op::Insert(k, s)),
            (0..12u8).prop_map(Op::Get),
            (0..12u8).prop_map(Op::Remove),
            Just(Op::Evict),
            (0..12u8, 0..12u8, any::<bool>()).prop_map(|(a, b, h)| Op::Hold(a.min(b), a.max(b), h)),
        ]
    }

    proptest! {
        /// Beside a list of (key, size, held), the one used last at the end.
        #[test]
        fn it_does_what_a_plain_list_does(ops in prop::collection::vec(op(), 1..200)) {
            let mut lru = Lru::new();
            let mut list: Vec<(u8, u64, bool)> = Vec::new();
            for op in ops {
                match op {
                    Op::Insert(k, size) => {
                        lru.insert(k, k, size, false);
                        list.retain(|e| e.0 != k);
                        list.push((k, size, false));
                    }
                    Op::Get(k) => {
                        let at = list.iter().position(|e| e.0 == k);
                        prop_assert_eq!(lru.get(&k).copied(), at.map(|_| k));
                        if let Some(at) = at {
                            let entry = list.remove(at);
                            list.push(entry);
                        }
                    }
                    Op::Remove(k) => {
                        let there = list.iter().any(|e| e.0 == k);
                        prop_assert_eq!(lru.remove(&k).is_some(), there);
                        list.retain(|e| e.0 != k);
                    }
                    Op::Evict => {
                        let oldest = list.iter().position(|e| !e.2).map(|at| list.remove(at).0);
                        prop_assert_eq!(lru.evict().map(|e| e.0), oldest);
                    }
                    Op::Hold(a, b, held) => {
                        lru.hold(a..=b, held);
                        // Letting go counts as a use, in the order of the keys.
                        let (mut within, mut rest): (Vec<_>, Vec<_>) =
                            list.into_iter().partition(|e| (a..=b).contains(&e.0));
                        within.sort_unstable_by_key(|e| e.0);
                        within.iter_mut().for_each(|e| e.2 = held);
                        rest.extend(within);
                        list = rest;
                    }
                }
                prop_assert_eq!(lru.used(), list.iter().map(|e| e.1).sum::<u64>());
                let mut keys: Vec<u8> = list.iter().map(|e| e.0).collect();
                keys.sort_unstable();
                prop_assert_eq!(lru.keys(0..=255).collect::<Vec<_>>(), keys);
            }
        }
    }
}
