//! A vector that grows by pages: it never moves what it holds, so growing costs one page and no pause.

/// Elements of a page.
pub const PAGE: usize = 1 << 14;

/// Elements `0..len`, all there; a new page is filled with defaults.
pub struct Pages<T> {
    pages: Vec<Box<[T; PAGE]>>,
}

impl<T: Default> Pages<T> {
    /// Nothing.
    pub fn new() -> Self {
        Self { pages: Vec::new() }
    }

    /// Make element `index` exist.
    pub fn reach(&mut self, index: usize) {
        while self.pages.len() * PAGE <= index {
            let page: Box<[T]> = std::iter::repeat_with(T::default).take(PAGE).collect();
            self.pages.push(page.try_into().unwrap_or_else(|_| unreachable!("it was made that long")));
        }
    }

    /// An element. Panics beyond what was reached.
    #[inline]
    pub fn at(&self, index: u32) -> &T {
        &self.pages[index as usize / PAGE][index as usize % PAGE]
    }

    /// An element, to change. Panics beyond what was reached.
    #[inline]
    pub fn at_mut(&mut self, index: u32) -> &mut T {
        &mut self.pages[index as usize / PAGE][index as usize % PAGE]
    }

    /// The `number`-th part of `N` elements; `N` divides [`PAGE`].
    #[inline]
    pub fn part<const N: usize>(&self, number: usize) -> Option<&[T; N]> {
        let (page, first) = (number * N / PAGE, number * N % PAGE);
        self.pages[page][first..first + N].first_chunk()
    }

    /// As [`Pages::part`], to change.
    #[inline]
    pub fn part_mut<const N: usize>(&mut self, number: usize) -> Option<&mut [T; N]> {
        let (page, first) = (number * N / PAGE, number * N % PAGE);
        self.pages[page][first..first + N].first_chunk_mut()
    }
}
