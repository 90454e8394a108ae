//! Entries of a table that are written in place, as the kernel's are.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::Hash,
    ops::{Deref, DerefMut},
    rc::Rc,
};

/// An entry of a table, and how often somebody looked at it.
#[derive(Debug)]
pub(super) struct Entry<T: Copy> {
    value: Cell<T>,
    looks: Cell<u64>,
}

/// A value in a table, writable in place.
///
/// The kernel hands out pointers; two of them to one entry see each other's writes. Here each
/// guard has a copy, which is written back when it goes. Where that would be seen, because
/// somebody looked at the entry while it was being changed, it panics.
#[derive(Debug)]
pub struct Guard<T: Copy + PartialEq> {
    copy: T,
    before: T,
    entry: Rc<Entry<T>>,
    look: u64,
}

impl<T: Copy + PartialEq> Guard<T> {
    fn of(entry: &Rc<Entry<T>>) -> Self {
        let look = entry.looks.get() + 1;
        entry.looks.set(look);
        Self {
            copy: entry.value.get(),
            before: entry.value.get(),
            entry: Rc::clone(entry),
            look,
        }
    }
}

impl<T: Copy + PartialEq> Deref for Guard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.copy
    }
}

impl<T: Copy + PartialEq> DerefMut for Guard<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.copy
    }
}

impl<T: Copy + PartialEq> Drop for Guard<T> {
    fn drop(&mut self) {
        if self.copy != self.before {
            self.entry.value.set(self.copy);
            if self.look != self.entry.looks.get() && !std::thread::panicking() {
                panic!("somebody looked at an entry while another changed it");
            }
        }
    }
}

/// A table of them.
pub(super) type Entries<K, T> = RefCell<HashMap<K, Rc<Entry<T>>>>;

/// Adds an entry unless there is one.
pub(super) fn insert<K: Hash + Eq + Copy, T: Copy>(
    entries: &Entries<K, T>,
    key: &K,
    value: &T,
) -> bool {
    let mut entries = entries.borrow_mut();
    if entries.contains_key(key) {
        return false;
    }
    let entry = Entry {
        value: Cell::new(*value),
        looks: Cell::new(0),
    };
    entries.insert(*key, Rc::new(entry));
    true
}

pub(super) fn look<K: Hash + Eq + Copy, T: Copy + PartialEq>(
    entries: &Entries<K, T>,
    key: &K,
) -> Option<Guard<T>> {
    entries.borrow().get(key).map(Guard::of)
}

pub(super) fn values<K: Hash + Eq + Copy, T: Copy>(entries: &Entries<K, T>) -> HashMap<K, T> {
    let entries = entries.borrow();
    entries
        .iter()
        .map(|(key, entry)| (*key, entry.value.get()))
        .collect()
}
