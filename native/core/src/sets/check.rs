//! Holder sets counted again, from what records name.

use super::*;

impl Sets {
    /// Panics where what is maintained differs from a fresh count. `named`: by set, how many records name it.
    pub fn check(&self, named: &[u32]) {
        let mut is_free = vec![false; self.sets.len()];
        for id in &self.free {
            assert!(!std::mem::replace(&mut is_free[*id as usize], true), "set {id} is twice in the free list");
        }
        let mut refs = vec![0; self.sets.len()];
        for id in 0..self.sets.len() as SetId {
            let end = self.resolve_within(id).expect("sets forward in a circle");
            assert_eq!(self.sets[id as usize].kind, self.sets[end as usize].kind, "set {id} forwards to another kind");
            refs[end as usize] += named.get(id as usize).copied().unwrap_or(0);
        }
        let (mut items, mut interned) = (0, 0);
        for (id, set) in self.sets.iter().enumerate() {
            if id == FREE as usize {
                assert!(set.items.is_empty() && set.refs == 0 && set.named == 0);
                continue;
            }
            let names = named.get(id).copied().unwrap_or(0);
            assert_eq!((set.named, set.refs), (names, refs[id]), "records that name and mean set {id}");
            items += set.items.len();
            let lives = !is_free[id] && set.forward as usize == id;
            if !lives {
                assert!(set.items.is_empty() && set.held == 0 && set.refs == 0, "set {id} is gone");
                assert!(!is_free[id] || (set.named == 0 && set.forward as usize == id), "set {id} is free and is meant");
                continue;
            }
            interned += 1;
            assert_eq!(set.held as usize, set.items.iter().filter(|item| is_held(**item)).count());
            let hash = hash_of(set.kind, &set.items, self.secret);
            assert_eq!(
                self.interned.find(hash, |other| *other as usize == id),
                Some(&(id as SetId)),
                "set {id} can't be found"
            );
            self.check_items(id as SetId, set);
        }
        assert_eq!((items, interned), (self.items, self.interned.len()), "items, sets");
    }

    fn resolve_within(&self, set: SetId) -> Option<SetId> {
        let mut set = set;
        for _ in 0..=self.sets.len() {
            let forward = self.sets[set as usize].forward;
            if forward == set {
                return Some(set);
            }
            set = forward;
        }
        None
    }

    fn check_items(&self, id: SetId, set: &HolderSet) {
        assert!(set.items.windows(2).all(|two| slot_in(two[0]) < slot_in(two[1])), "items of set {id} are in order");
        for item in &set.items {
            assert!(copies_in(*item) > 0);
            if is_held(*item) {
                continue;
            }
            let (stream, generation) = (stream_of(slot_in(*item)), place_of(slot_in(*item)));
            assert!(set.kind != Kind::Key, "set {id}: a Key remembers nothing");
            assert_eq!(self.of_stream(id, stream), [*item], "set {id}: held and remembered at once");
            let listed = &self.retired_in[stream as usize][generation as usize];
            assert!(listed.contains(&id), "set {id} is not listed as one with retired blocks");
        }
    }
}
