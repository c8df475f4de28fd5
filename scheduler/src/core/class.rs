//! Kinds of jobs: all that planning asks of a job but whose it is and when it came. A queue of a million lines has a few.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::events::Ask;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClassIx(pub u32);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Class {
    /// `None`: whichever model is the only one registered.
    pub model: Option<Arc<str>>,
    pub ask: Ask,
    /// Labels that the node has to have.
    pub require: Arc<BTreeMap<String, String>>,
}

/// The classes of all jobs that are not ended, each kept while a job is of it.
#[derive(Debug, Default)]
pub struct Classes {
    by_class: HashMap<Arc<Class>, ClassIx>,
    entries: Vec<Entry>,
    vacant: Vec<ClassIx>,
}

#[derive(Debug)]
struct Entry {
    class: Arc<Class>,
    jobs: u64,
    /// Jobs that wait for nothing but devices.
    waiting: u64,
}

impl Classes {
    /// The class's index; to be given back with [`Self::drop_job`].
    pub fn add_job(&mut self, class: Class) -> ClassIx {
        if let Some(&ix) = self.by_class.get(&class) {
            self.entries[ix.0 as usize].jobs += 1;
            return ix;
        }
        let class = Arc::new(class);
        let entry = Entry { class: class.clone(), jobs: 1, waiting: 0 };
        let ix = match self.vacant.pop() {
            Some(ix) => {
                self.entries[ix.0 as usize] = entry;
                ix
            }
            None => {
                self.entries.push(entry);
                ClassIx(self.entries.len() as u32 - 1)
            }
        };
        self.by_class.insert(class, ix);
        ix
    }

    /// True if it was the last job of the class: its index may mean another from now on.
    pub fn drop_job(&mut self, ix: ClassIx) -> bool {
        let entry = &mut self.entries[ix.0 as usize];
        entry.jobs -= 1;
        if entry.jobs == 0 {
            self.by_class.remove(&entry.class);
            self.vacant.push(ix);
        }
        entry.jobs == 0
    }

    pub fn get(&self, ix: ClassIx) -> &Arc<Class> {
        &self.entries[ix.0 as usize].class
    }

    pub fn count_waiting(&mut self, ix: ClassIx, more: bool) {
        let waiting = &mut self.entries[ix.0 as usize].waiting;
        *waiting = if more { *waiting + 1 } else { *waiting - 1 };
    }

    /// Classes with jobs that wait for devices, and how many.
    pub fn waiting(&self) -> impl Iterator<Item = (ClassIx, u64)> {
        let entries = self.entries.iter().enumerate().filter(|(_, entry)| entry.jobs > 0 && entry.waiting > 0);
        entries.map(|(i, entry)| (ClassIx(i as u32), entry.waiting))
    }

    /// Each class has so many jobs, and so many of them wait for devices.
    pub fn check(&self, counted: &HashMap<ClassIx, (u64, u64)>) -> Result<(), String> {
        for (i, entry) in self.entries.iter().enumerate() {
            let (known, counted) = ((entry.jobs, entry.waiting), counted.get(&ClassIx(i as u32)));
            if known != counted.copied().unwrap_or_default() {
                return Err(format!("class {i} counts {known:?}, its jobs make {counted:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn class(model: &str) -> Class {
        Class { model: Some(model.into()), ask: Ask::default(), require: Arc::default() }
    }

    #[test]
    fn a_class_lives_as_long_as_its_jobs() {
        let mut classes = Classes::default();
        let (a, again, b) = (classes.add_job(class("a")), classes.add_job(class("a")), classes.add_job(class("b")));
        assert_eq!(a, again);
        assert_ne!(a, b);
        classes.drop_job(a);
        assert_eq!(classes.get(a).model.as_deref(), Some("a"));
        classes.drop_job(a);
        assert_eq!(classes.add_job(class("c")), a, "its place is used again");
        assert_eq!(classes.get(a).model.as_deref(), Some("c"));
    }
}
