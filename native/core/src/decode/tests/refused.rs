//! What is not read here: all that Python faults, and oddities that are left to it.

use super::maps::{full, small};
use super::value::{Value, array, ints, map};
use super::{payload, read, read_events};
use crate::decode::Wire;

fn removal() -> Value {
    map(&[("type", "BlockRemoved".into()), ("block_hashes", ints([1]))])
}

/// One good payload of each form.
fn good() -> Vec<(Wire, Vec<u8>)> {
    let clear = map(&[("type", "AllBlocksCleared".into()), ("medium", "CPU".into())]);
    let maps = payload(vec![full(), removal(), clear]);
    let salt = map(&[("cache_salt", "tenant".into())]);
    let array_event = array(&[
        "BlockStored".into(),
        array(&[(-5).into(), Value::Bin(vec![7; 32])]),
        3.into(),
        ints([1, 200, 60_000, 70_000]),
        2.into(),
        4.into(),
        "GPU".into(),
        salt,
    ]);
    let arrays = payload(vec![array_event, array(&["BlockRemoved".into(), ints([-1])]), array(&["AllBlocksCleared".into()])]);
    vec![(Wire::Vllm, maps), (Wire::Vllm, arrays.clone()), (Wire::Sglang, arrays)]
}

#[test]
fn a_payload_that_is_cut_short_or_goes_on() {
    for (wire, payload) in good() {
        assert!(read(wire, &payload).is_ok());
        for end in 0..payload.len() {
            assert!(read(wire, &payload[..end]).is_err(), "cut at {end}");
        }
        assert!(read(wire, &[&payload[..], &[0xC0]].concat()).is_err());
    }
}

#[test]
fn any_byte_may_be_any_other_without_panic() {
    for (wire, payload) in good() {
        for at in (0..payload.len()).step_by(if cfg!(miri) { 16 } else { 1 }) {
            let mut damaged = payload.clone();
            for byte in (0..=u8::MAX).step_by(if cfg!(miri) { 64 } else { 1 }) {
                damaged[at] = byte;
                if let Ok(batch) = read(wire, &damaged) {
                    assert!(batch.hashes.len() <= damaged.len() && batch.tokens.len() <= damaged.len());
                }
            }
        }
    }
}

#[test]
fn a_declared_length_costs_no_memory() {
    let huge: [&[u8]; 5] = [&[0xDD], &[0xDF], &[0xC6], &[0xDB], &[0xC9]].map(|marker: &[u8; 1]| &marker[..]);
    for marker in huge {
        let value = Value::Raw([marker, &[0xFF; 4], &[0; 8]].concat());
        assert!(read(Wire::Vllm, &value.packed()).is_err());
        assert!(read(Wire::Vllm, &array(&[1.into(), value.clone()]).packed()).is_err());
        for key in ["block_hashes", "parent_block_hash", "token_ids", "extra_keys", "metadata", "medium", "unknown"] {
            assert!(read_events(Wire::Vllm, vec![small().with(key, value.clone())]).is_err());
        }
        let mut batch = crate::events::Batch::default();
        let event = payload(vec![small().with("token_ids", value)]);
        assert!(crate::decode::decode(&event, Wire::Vllm, &mut batch).is_err());
        assert!(batch.tokens.capacity() < 64 && batch.hashes.capacity() < 64);
    }
}

#[test]
fn batches_of_another_shape() {
    for odd in [
        array(&[]),
        array(&[1.into()]),
        map(&[("ts", 1.into())]),
        array(&["1".into(), ints([])]),
        array(&[Value::Bool(true), ints([])]),
        array(&[Value::Float(f64::NAN), ints([])]),
        array(&[Value::Float(f64::INFINITY), ints([])]),
        array(&[1.into(), Value::Nil]),
        array(&[1.into(), map(&[])]),
        array(&[1.into(), ints([]), (-1).into()]),
        array(&[1.into(), ints([]), 0x1_0000.into()]),
        array(&[1.into(), ints([]), Value::Float(1.0)]),
        array(&[1.into(), ints([]), Value::Nil, Value::Raw(vec![0xC1])]),
        array(&[1.into(), ints([1])]),
        array(&[1.into(), array(&[Value::Nil])]),
        array(&[1.into(), array(&[array(&[])])]),
        array(&[1.into(), array(&[map(&[])])]),
    ] {
        assert!(read(Wire::Vllm, &odd.packed()).is_err(), "{odd:?}");
    }
}

#[test]
fn fields_of_another_type_or_out_of_range() {
    let nested = |levels| (0..levels).fold(Value::Nil, |inner, _| array(&[inner]));
    assert!(read_events(Wire::Vllm, vec![small().with("unknown", nested(32))]).is_ok());
    for (key, value) in [
        ("type", "BlockCreated".into()),
        ("type", Value::Nil),
        ("type", Value::Bin(b"BlockStored".to_vec())),
        ("block_hashes", Value::Nil),
        ("block_hashes", array(&["7".into(), 8.into()])),
        ("block_hashes", array(&[Value::Bin(vec![]), 8.into()])),
        ("block_hashes", array(&[Value::Float(7.0), 8.into()])),
        ("parent_block_hash", Value::Float(7.0)),
        ("parent_block_hash", Value::Bin(vec![])),
        ("token_ids", Value::Nil),
        ("token_ids", ints([-1])),
        ("token_ids", ints([1 << 32])),
        ("token_ids", array(&[Value::Float(1.0)])),
        ("token_ids", array(&[Value::Bool(true)])),
        ("token_ids", array(&[ints([1, 2])])),
        ("block_size", 0.into()),
        ("block_size", Value::Nil),
        ("block_size", (-1).into()),
        ("block_size", ((1 << 20) + 1).into()),
        ("block_size", Value::Float(2.0)),
        ("lora_id", Value::Bool(true)),
        ("medium", 1.into()),
        ("medium", "é".into()),
        ("medium", Value::Raw(vec![0xA1, 0xFF])),
        ("lora_name", 1.into()),
        ("lora_name", Value::Raw(vec![0xA1, 0xFF])),
        ("extra_keys", 1.into()),
        ("group_idx", (-1).into()),
        ("group_idx", 0x1_0000.into()),
        ("kv_cache_spec_kind", 1.into()),
        ("kv_cache_spec_sliding_window", "1".into()),
        ("session_id", 1.into()),
        ("locality", 1.into()),
        ("ownership", ints([])),
        ("cache_salt", 1.into()),
        ("metadata", array(&[])),
        ("metadata", map(&[("cache_salt", 1.into())])),
        ("metadata", Value::Map(vec![(1.into(), 1.into())])),
        ("metadata", Value::Map(vec![("cache_salt".into(), Value::Nil), ("cache_salt".into(), "s".into())])),
        ("unknown", Value::Raw(vec![0xC1])),
        ("unknown", Value::Raw(vec![0xD4, 1, 1])),
        ("unknown", Value::Raw(vec![0xA1, 0xFF])),
        ("unknown", nested(33)),
    ] {
        assert!(read_events(Wire::Vllm, vec![small().with(key, value.clone())]).is_err(), "{key}: {value:?}");
    }
}

#[test]
fn texts_are_limited_in_characters() {
    for key in ["lora_name", "lora_id", "session_id", "locality", "ownership"] {
        let event = |length| small().with(key, "é".repeat(length).as_str());
        assert!(read_events(Wire::Vllm, vec![event(4096)]).is_ok(), "{key}");
        assert!(read_events(Wire::Vllm, vec![event(4097)]).is_err(), "{key}");
    }
}

#[test]
fn maps_without_a_required_key_or_with_one_twice() {
    for key in ["type", "block_hashes", "parent_block_hash", "token_ids", "block_size"] {
        assert!(read_events(Wire::Vllm, vec![small().without(key)]).is_err(), "no {key}");
    }
    assert!(read_events(Wire::Vllm, vec![removal().without("block_hashes")]).is_err());
    let Value::Map(pairs) = full() else { unreachable!() };
    for pair in &pairs {
        let twice = Value::Map([&pairs[..], std::slice::from_ref(pair)].concat());
        assert!(read_events(Wire::Vllm, vec![twice]).is_err(), "{pair:?} twice");
    }
    let mut odd_key = pairs;
    odd_key.push((Value::Raw(vec![0xA1, 0xFF]), Value::Nil));
    assert!(read_events(Wire::Vllm, vec![Value::Map(odd_key)]).is_err());
}

#[test]
#[cfg_attr(miri, ignore = "a quarter of a million extras take Miri too long")]
fn more_extras_than_a_payload_may_hold() {
    let extras = |count| Value::Array(vec![Value::Array(vec!["a".into(); count]), Value::Nil]);
    let many = vec![small().with("extra_keys", extras(0xFFFF)); 4];
    let exactly = [&many[..], &[small().with("extra_keys", extras(4))]].concat();
    assert!(read_events(Wire::Vllm, exactly.clone()).is_ok());
    assert!(read_events(Wire::Vllm, [&exactly[..], &[small().with("extra_keys", extras(1))]].concat()).is_err());
    let long = |length: usize| small().with("extra_keys", array(&[array(&["x".repeat(length).as_str().into()]), Value::Nil]));
    assert!(read_events(Wire::Vllm, vec![long((64 << 10) - 3)]).is_ok());
    assert!(read_events(Wire::Vllm, vec![long((64 << 10) - 2)]).is_err());
}
