//! Hints about memory: tables are larger than the processor's caches, and a miss costs as much as a hundred instructions.
//!
//! Both are hints: they change how long something takes, never what it does.

use std::mem::MaybeUninit;

/// Ask for the cache line of a value before it is needed: so many misses are waited for at once.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[expect(unsafe_code, reason = "a hint: it reads nothing, and any address is allowed")]
    // SAFETY: prefetching neither reads nor writes what it points to, and can't fault.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = value;
}

/// Ask the kernel to back memory that is not in use yet by large pages: with small ones, finding the page of an address misses
/// its cache too.
pub fn prefer_large_pages<T>(unused: &mut [MaybeUninit<T>]) {
    #[cfg(all(target_os = "linux", not(miri)))]
    {
        const PAGE_BYTES: usize = 4096;
        let start = (unused.as_mut_ptr() as usize).next_multiple_of(PAGE_BYTES);
        let end = (unused.as_mut_ptr() as usize + size_of_val(unused)) / PAGE_BYTES * PAGE_BYTES;
        if start < end {
            #[expect(unsafe_code, reason = "a system call that Rust has no safe form of")]
            // SAFETY: the whole pages from `start` to `end` lie within `unused`, which is borrowed for this call. The advice
            // changes neither their contents nor what may be done with them.
            unsafe {
                libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
            }
        }
    }
    #[cfg(not(all(target_os = "linux", not(miri))))]
    let _ = unused;
}
