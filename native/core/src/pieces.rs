//! A prompt's content as chained hashes of its pieces. As `kvatlas.route.prefix.hashes`.

use xxhash_rust::xxh64::xxh64;

/// The hashes of `content` in pieces of `piece_bytes` after `root`, the last one cut where the content ends.
///
/// `added`: what a piece has besides, by where the piece starts.
pub fn hashes<'a>(content: &[u8], piece_bytes: usize, root: u64, added: impl Fn(usize) -> Option<&'a [u8]>) -> Vec<u64> {
    let mut last = root;
    let pieces = content.chunks(piece_bytes).enumerate();
    pieces
        .map(|(number, piece)| {
            let own = match added(number * piece_bytes) {
                Some(added) => xxh64(&[piece, added].concat(), 0),
                None => xxh64(piece, 0),
            };
            let mut both = [0; 16];
            both[..8].copy_from_slice(&own.to_le_bytes());
            both[8..].copy_from_slice(&last.to_le_bytes());
            last = xxh64(&both, 0);
            last
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_says_all_that_comes_before() {
        let plain = |content: &[u8]| hashes(content, 4, 7, |_| None);
        let found = plain(b"aaaabbbbcc");
        assert_eq!(found.len(), 3);
        assert_eq!(plain(b"aaaabbbb"), found[..2]);
        assert_ne!(plain(b"aaaXbbbb")[1], found[1]);
        let with = hashes(b"aaaabbbbcc", 4, 7, |start| (start == 4).then_some(&b"image"[..]));
        assert_eq!(with[0], found[0]);
        assert!(with[1] != found[1] && with[2] != found[2]);
        assert!(plain(b"").is_empty());
    }
}
