//! A vector that grows by groups of pages: it never moves what it holds, so growing costs one page and no pause.

use crate::memory::prefer_large_pages;

/// Elements of a page: what it grows by.
pub const PAGE: usize = crate::size(1 << 12, 1 << 10);
/// Elements of a group: room that is reserved together, and used as it is needed.
const GROUP: usize = crate::size(1 << 22, 1 << 11);
/// What a small vector takes before large pages are worth their size.
const SMALL_BYTES: usize = crate::size(1 << 21, 1 << 10);

/// Elements `0..len`, all there; a new page is filled with defaults.
pub struct Pages<T> {
    groups: Vec<Vec<T>>,
    access: Access,
}

/// How elements are mostly asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// One after the other.
    InOrder,
    /// Anywhere: worth large pages, of which the last one is half empty.
    Anywhere,
}

impl<T: Default> Pages<T> {
    /// Nothing.
    pub fn new(access: Access) -> Self {
        Self { groups: Vec::new(), access }
    }

    /// Make element `index` exist.
    pub fn reach(&mut self, index: usize) {
        while self.len() <= index {
            if self.groups.last().is_none_or(|group| group.len() == GROUP) {
                let mut group = Vec::with_capacity(GROUP);
                let small = if self.groups.is_empty() { SMALL_BYTES / size_of::<T>() } else { 0 };
                if self.access == Access::Anywhere {
                    prefer_large_pages(&mut group.spare_capacity_mut()[small..]);
                }
                self.groups.push(group);
            }
            if let Some(group) = self.groups.last_mut() {
                group.resize_with(group.len() + PAGE, T::default);
            }
        }
    }

    fn len(&self) -> usize {
        self.groups.last().map_or(0, |group| (self.groups.len() - 1) * GROUP + group.len())
    }

    /// An element. Panics beyond what was reached.
    #[inline]
    pub fn at(&self, index: u32) -> &T {
        &self.groups[index as usize / GROUP][index as usize % GROUP]
    }

    /// An element, to change. Panics beyond what was reached.
    #[inline]
    pub fn at_mut(&mut self, index: u32) -> &mut T {
        &mut self.groups[index as usize / GROUP][index as usize % GROUP]
    }

    /// The `number`-th part of `N` elements; `N` divides [`PAGE`].
    #[inline]
    pub fn part<const N: usize>(&self, number: usize) -> Option<&[T; N]> {
        let (group, first) = (number * N / GROUP, number * N % GROUP);
        self.groups[group][first..].first_chunk()
    }

    /// As [`Pages::part`], to change.
    #[inline]
    pub fn part_mut<const N: usize>(&mut self, number: usize) -> Option<&mut [T; N]> {
        let (group, first) = (number * N / GROUP, number * N % GROUP);
        self.groups[group][first..].first_chunk_mut()
    }
}
