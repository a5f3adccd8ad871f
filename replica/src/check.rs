//! The invariants of a pool, for tests to assert after every step.

use crate::extents::ExtentState;
use crate::pool::{Mapping, Pool, PoolState};

impl Pool {
    /// Asserts what must hold between any two events. Slow: it looks at everything.
    ///
    /// # Panics
    /// Where an invariant is broken.
    pub fn check(&self) {
        if self.state != PoolState::Online {
            return;
        }
        let free = self.extents.check_lists();
        self.check_open();
        let mut referenced = vec![false; self.extents.len() as usize];
        let mut mapped = 0;
        for (i, layer) in (0u16..).zip(&self.layers) {
            assert_eq!(self.layer_of(layer.owner), i, "layer {i} and its slot know each other");
            let (mut allocated, mut pending, mut taken, mut leaving) = (0, 0, 0, 0);
            for logical in 0..layer.map.len() {
                let logical = u32::try_from(logical).expect("a map has at most 2^31 entries");
                match layer.mapping(logical) {
                    Mapping::Hole => {}
                    Mapping::Pending(alloc) => {
                        let alloc = self.allocs.get(alloc);
                        assert_eq!(
                            (alloc.layer, alloc.logical),
                            (i, logical),
                            "a stray allocation"
                        );
                        pending += 1;
                        taken += u32::from(alloc.has_taken());
                    }
                    Mapping::Extent(extent) => {
                        assert!(!referenced[extent as usize], "extent {extent} is mapped twice");
                        referenced[extent as usize] = true;
                        let e = self.extents.get(extent);
                        leaving += u32::from(e.state == ExtentState::Moving);
                        let live = matches!(e.state, ExtentState::Allocated | ExtentState::Moving);
                        assert!(live, "extent {extent} is live");
                        assert_eq!(
                            (e.layer, e.link),
                            (i, logical),
                            "extent {extent} knows its place"
                        );
                        allocated += 1;
                    }
                }
            }
            assert_eq!(allocated, layer.allocated, "layer {i} counts its extents");
            let counted = (layer.allocs, layer.taken);
            assert_eq!((pending, taken), counted, "layer {i} counts its allocations");
            assert_eq!(leaving, layer.leaving, "layer {i} counts what it hands over");
            let on_top = self.layers.iter().filter(|l| l.parent == Some(i)).count();
            // A clone or a way back under way counts already.
            assert!(on_top <= layer.children as usize, "layer {i} counts its children");
            mapped += allocated;
        }
        let reserved = self.wanted_reserve();
        assert!(self.shared || reserved == self.reserved, "the pool counts what is reserved");
        assert!(
            self.bound <= self.reserved,
            "what is reserved here for good is part of the reserve"
        );
        assert_eq!(mapped, self.extents.allocated, "the pool counts its extents");
        let (mut taken, mut returning, mut quarantined) = (0, 0, 0);
        for (i, e) in self.extents.iter() {
            match e.state {
                ExtentState::Allocated | ExtentState::Moving => {
                    assert!(referenced[i as usize], "extent {i} is allocated and not mapped");
                }
                ExtentState::Taken => taken += 1,
                ExtentState::Freeing | ExtentState::Cleaning => returning += 1,
                ExtentState::Quarantined => quarantined += 1,
                ExtentState::FreeZeroed | ExtentState::FreeUnzeroed => {}
            }
        }
        assert_eq!(returning, self.extents.returning, "the pool counts what returns");
        assert_eq!(
            free + mapped + taken + returning + quarantined,
            self.extents.len(),
            "every extent is somewhere"
        );
    }
}
