//! Asking for memory before it is needed: tables are larger than the processor's caches, and a miss costs as much as a hundred
//! instructions. Asked for ahead, many misses are waited for at once.

/// Ask for the cache line of a value.
#[inline(always)]
pub fn prefetch<T>(value: &T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[expect(unsafe_code, reason = "the instruction is a hint: it reads nothing, and any address is allowed")]
    // SAFETY: `value` is a valid reference, and prefetching neither reads nor writes what it points to.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(value).cast());
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = value;
}
