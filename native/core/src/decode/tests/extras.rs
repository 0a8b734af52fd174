//! Extra keys: what a string means follows from its place.

use super::maps::small;
use super::value::{Value, array, map};
use super::{read_events, stored};
use crate::decode::Wire;

/// Offset, kind and value of an extra.
type Plain = (i64, String, Vec<u8>);

/// The extras of each block.
fn extras(event: Value) -> Option<Vec<Vec<Plain>>> {
    let (_, event) = stored(Wire::Vllm, event);
    let plain = |blocks: Vec<Vec<crate::events::Extra>>| {
        let tuple = |extra: crate::events::Extra| (extra.offset_tokens, extra.kind.to_string(), extra.value.to_vec());
        blocks.into_iter().map(|block| block.into_iter().map(tuple).collect()).collect()
    };
    let padded = |mut blocks: Vec<Vec<_>>| {
        blocks.resize(event.hashes.len(), Vec::new());
        blocks
    };
    event.extras.map(plain).map(padded)
}

fn one(offset_tokens: i64, kind: &str, value: &[u8]) -> Vec<Plain> {
    vec![(offset_tokens, kind.into(), value.into())]
}

fn keyed(first: Value, second: Value) -> Value {
    small().with("extra_keys", array(&[first, second]))
}

#[test]
fn none_are_not_the_same_as_empty_ones() {
    assert_eq!(extras(small().with("extra_keys", Value::Nil)), None);
    assert_eq!(extras(keyed(Value::Nil, array(&[]))), Some(vec![vec![], vec![]]));
}

#[test]
fn a_string_is_a_salt_in_the_first_block_of_a_chain_only() {
    let event = keyed(array(&["a".into()]), array(&["b".into()]));
    assert_eq!(extras(event.clone()), Some(vec![one(0, "salt", b"a"), one(0, "opaque", b"\xA1b")]));
    let later = event.with("parent_block_hash", 5);
    assert_eq!(extras(later), Some(vec![one(0, "opaque", b"\xA1a"), one(0, "opaque", b"\xA1b")]));
}

#[test]
fn the_adapters_name_is_left_out_where_it_stands_first() {
    let event = keyed(array(&["fr".into(), "fr".into()]), array(&["fr".into()])).with("lora_name", "fr");
    assert_eq!(extras(event), Some(vec![one(0, "salt", b"fr"), vec![]]));
    let numbered = keyed(Value::Nil, array(&["lora:3".into()])).with("lora_id", 3);
    assert_eq!(extras(numbered), Some(vec![vec![], vec![]]));
}

#[test]
fn a_salt_that_is_told_apart_counts_once_and_on_the_first_block() {
    let salted = small().with("cache_salt", "s");
    assert_eq!(extras(salted.clone()), Some(vec![one(0, "salt", b"s"), vec![]]));
    let twice = salted.clone().with("extra_keys", array(&[array(&["x:s".into()]), array(&["y".into()])]));
    assert_eq!(extras(twice), Some(vec![one(0, "salt", b"s"), one(0, "opaque", b"\xA1y")]));
    assert_eq!(extras(salted.clone().with("parent_block_hash", 5)), None);
    assert_eq!(extras(salted.with("block_hashes", array(&[]))), None);
}

#[test]
fn an_empty_salt_gives_way_to_the_metadatas() {
    let metadata = map(&[("cache_salt", "m".into())]);
    let event = small().with("cache_salt", "").with("metadata", metadata.clone());
    assert_eq!(extras(event), Some(vec![one(0, "salt", b"m"), vec![]]));
    let event = small().with("cache_salt", "s").with("metadata", metadata.clone());
    assert_eq!(extras(event), Some(vec![one(0, "salt", b"s"), vec![]]));
    assert_eq!(extras(small().with("lora_name", metadata)), None, "in a map that is no place for it");
    assert_eq!(extras(small().with("cache_salt", "")), None);
}

#[test]
fn items_and_bytes_are_kept() {
    let item = |offset: i64| array(&["image".into(), offset.into()]);
    let event = keyed(array(&[item(-7), Value::Bin(vec![1, 2])]), array(&[item((1 << 31) - 1)]));
    let expected = vec![[one(-7, "mm", b"image"), one(0, "opaque", &[1, 2])].concat(), one((1 << 31) - 1, "mm", b"image")];
    assert_eq!(extras(event), Some(expected));
}

#[test]
fn opaque_strings_are_msgpack_in_its_shortest_form() {
    for (length, head) in [(31, &[0xBF][..]), (32, &[0xD9, 32]), (255, &[0xD9, 255]), (256, &[0xDA, 1, 0])] {
        let text = "x".repeat(length);
        let event = keyed(Value::Nil, array(&[text.as_str().into()]));
        assert_eq!(extras(event), Some(vec![vec![], one(0, "opaque", &[head, text.as_bytes()].concat())]));
    }
}

#[test]
fn what_is_not_understood_is_left_to_python() {
    for odd in [
        1.into(),
        Value::Nil,
        Value::Bool(true),
        Value::Float(1.0),
        array(&["image".into()]),
        array(&["image".into(), Value::Bool(true)]),
        array(&["image".into(), (1_i64 << 31).into()]),
        array(&["image".into(), (-(1_i64 << 31) - 1).into()]),
        array(&[1.into(), 1.into()]),
        map(&[]),
    ] {
        assert!(read_events(Wire::Vllm, vec![keyed(Value::Nil, array(&[odd]))]).is_err());
    }
}

#[test]
fn there_is_one_entry_a_hash() {
    let nils = |count| Value::Array(vec![Value::Nil; count]);
    for count in 0..4 {
        assert_eq!(read_events(Wire::Vllm, vec![small().with("extra_keys", nils(count))]).is_ok(), count == 2);
    }
}
