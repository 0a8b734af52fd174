//! Events as arrays: older vLLM, and SGLang with an array that grew from version to version.

use super::maps::full;
use super::value::{Value, array, ints, map};
use super::{read_events, removed, stored};
use crate::decode::Wire;
use crate::events::{Event, Tier};

/// The oldest layout; each later one adds to it.
fn first() -> Value {
    array(&["BlockStored".into(), ints([-5, 6]), Value::Nil, ints([1, 2, 3, 4]), 2.into(), Value::Nil])
}

/// A map's values in the order of an array, with what stands last.
fn in_order(event: &Value, last: &str) -> Vec<Value> {
    let Value::Map(pairs) = event else { panic!("no map") };
    let value = |name: &str| pairs.iter().find(|(key, _)| matches!(key, Value::Str(key) if key == name)).unwrap().1.clone();
    let names = [
        "type",
        "block_hashes",
        "parent_block_hash",
        "token_ids",
        "block_size",
        "lora_id",
        "medium",
        "lora_name",
        "extra_keys",
        "group_idx",
        "kv_cache_spec_kind",
        "kv_cache_spec_sliding_window",
        "locality",
        "ownership",
        last,
    ];
    names.map(value).to_vec()
}

#[test]
fn an_array_says_what_the_map_says() {
    let event = full().with("cache_salt", Value::Nil);
    let vllm = in_order(&event, "session_id");
    let unsalted = event.clone().with("metadata", Value::Nil);
    assert_eq!(read_events(Wire::Vllm, vec![vllm.into()]), read_events(Wire::Vllm, vec![unsalted]));
    let sglang = in_order(&event, "metadata");
    assert_eq!(read_events(Wire::Sglang, vec![sglang.into()]), read_events(Wire::Sglang, vec![event]));
}

#[test]
fn trailing_fields_may_be_left_out_down_to_the_block_size() {
    let fields = in_order(&full(), "session_id");
    for count in 0..=fields.len() {
        let read = read_events(Wire::Vllm, vec![fields[..count].to_vec().into()]);
        assert_eq!(read.is_ok(), count >= 5, "{count} fields");
    }
    let (_, event) = stored(Wire::Vllm, fields[..7].to_vec().into());
    assert_eq!((event.tier, event.lora_name, event.extras), (Tier::named("cpu"), None, None));
}

#[test]
fn fields_beyond_those_known_are_skipped() {
    let event = Value::Array(in_order(&full(), "session_id"));
    let longer = event.clone().and(&[map(&[("x", ints([1]))]), Value::Bool(false)]);
    assert_eq!(read_events(Wire::Vllm, vec![longer]), read_events(Wire::Vllm, vec![event]));
}

#[test]
fn sglang_has_its_metadata_behind_the_medium_or_at_the_end() {
    let salt = map(&[("cache_salt", "tenant".into())]);
    let nils = |count| vec![Value::Nil; count];
    let short = first().and(&["GPU".into(), salt.clone()]);
    let long = first().and(&["GPU".into()]).and(&nils(7)).and(&[salt]);
    for event in [short, long] {
        let (batch, event) = stored(Wire::Sglang, event);
        assert_eq!(batch.hashes, [u64::MAX - 4, 6]);
        assert_eq!(event.lora_name, None);
        let extras = event.extras.unwrap();
        assert_eq!((&*extras[0][0].kind, &*extras[0][0].value, extras[0].len()), ("salt", &b"tenant"[..], 1));
        assert_eq!(extras.len(), 1);
    }
}

#[test]
fn metadata_at_the_end_overrides_metadata_behind_the_medium() {
    let salt = map(&[("cache_salt", "tenant".into())]);
    let event = first().and(&["GPU".into(), salt]).and(&vec![Value::Nil; 6]).and(&[map(&[])]);
    assert_eq!(stored(Wire::Sglang, event).1.extras, None);
}

#[test]
fn removals_have_other_fields_in_each_engine() {
    let event = array(&["BlockRemoved".into(), ints([1]), "CPU".into(), 2.into()]);
    for wire in [Wire::Vllm, Wire::Sglang] {
        let (_, removal) = removed(wire, event.clone());
        assert_eq!((removal.tier, removal.group), (Tier::named("cpu"), Some(2)));
        assert_eq!(removed(wire, array(&["BlockRemoved".into(), ints([-1])])).0.hashes, [u64::MAX]);
    }
    let more = event.and(&["mamba".into(), 64.into(), "LOCAL".into(), "x".into()]);
    assert!(read_events(Wire::Sglang, vec![more.clone()]).is_ok());
    assert!(read_events(Wire::Vllm, vec![more]).is_err(), "64 is no owner");
}

#[test]
fn a_clear_has_a_medium_in_vllm_and_an_owner_in_sglang() {
    let event = array(&["AllBlocksCleared".into(), "CPU".into()]);
    let events = |wire| read_events(wire, vec![event.clone()]).unwrap().events;
    assert_eq!(events(Wire::Vllm), [Event::Cleared(Some(Tier::named("cpu")))]);
    assert_eq!(events(Wire::Sglang), [Event::Cleared(None)]);
    let bare = array(&["AllBlocksCleared".into()]);
    assert_eq!(read_events(Wire::Sglang, vec![bare]).unwrap().events, [Event::Cleared(None)]);
}
