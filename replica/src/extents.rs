//! The allocation table in memory: an entry for each physical extent, and the free lists through them.

use crate::disk::{ENTRIES_PER_PAGE, EXTENT, Entry, EntryState, Segment};

/// The end of a free list.
pub(crate) const NIL: u32 = u32::MAX;

/// What becomes of an extent. Only free, free and zeroed, and allocated are states on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExtentState {
    /// On the list of extents that must be zeroed before use.
    FreeUnzeroed,
    /// On the list of extents that read as zeros, durably.
    FreeZeroed,
    /// Off the lists, on the way to `Allocated`; its record is not durable yet.
    Taken,
    /// A replica's.
    Allocated,
    /// On its way from one layer to another; the record that says so is not durable yet.
    Moving,
    /// No longer mapped; the record that says so is not durable yet.
    Freeing,
    /// Free durably; waits for its I/O to drain and for the zeroing.
    Cleaning,
    /// Could not be zeroed: not used again until the pool is opened anew.
    Quarantined,
}

/// Whether an extent was changed since it was settled, and what is on its way to say so. What is durable is
/// one bit: closed, or open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opened {
    /// Settled, or never written.
    Closed,
    /// Closed durably; the record that opens it is on its way. Nothing may change before that.
    Opening,
    /// Open, and changed since its replica last began to settle.
    Fresh,
    /// Open, and not changed since then.
    Candidate,
    /// Open durably; the record that closes it is on its way. Nothing may change before that.
    Closing,
}

impl Opened {
    /// What stable storage says.
    pub(crate) fn is_durable(self) -> bool {
        matches!(self, Self::Fresh | Self::Candidate | Self::Closing)
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    /// When it was last settled.
    pub(crate) stamp: u64,
    /// The journal block that allocated it.
    pub(crate) birth: u64,
    /// The logical extent; on a free list, the next one.
    pub(crate) link: u32,
    /// Device operations on its data in flight.
    pub(crate) pins: u32,
    /// Its checksums in memory, or [`NIL`].
    pub(crate) sum: u32,
    pub(crate) layer: u16,
    pub(crate) state: ExtentState,
    /// Marked dirty durably.
    pub(crate) dirty: bool,
    /// The current copy of its checksum page, while it is clean.
    pub(crate) copy: bool,
    pub(crate) opened: Opened,
    /// It is on the pool's list of open extents.
    pub(crate) listed: bool,
}

const _: () = assert!(size_of::<Extent>() == 40);

/// A table page in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    pub(crate) sequence: u64,
    pub(crate) checkpoint: u64,
    pub(crate) base: u64,
    pub(crate) dirty: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Extents {
    all: Vec<Extent>,
    pub(crate) pages: Vec<Page>,
    zeroed: FreeList,
    unzeroed: FreeList,
    pub(crate) allocated: u32,
    /// Extents on their way to a free list.
    pub(crate) returning: u32,
    /// Allocated extents that are unfinished copies: few, and mostly none.
    pub(crate) incoming: Vec<u32>,
}

#[derive(Debug)]
struct FreeList {
    head: u32,
    len: u32,
}

impl Default for FreeList {
    fn default() -> Self {
        Self { head: NIL, len: 0 }
    }
}

impl Extents {
    pub(crate) fn len(&self) -> u32 {
        u32::try_from(self.all.len()).expect("extents are counted in 31 bits")
    }

    pub(crate) fn free(&self) -> u32 {
        self.zeroed.len + self.unzeroed.len
    }

    pub(crate) fn reserve(&mut self, extents: u32, pages: u32) {
        self.all.reserve_exact(extents as usize);
        self.pages.reserve_exact(pages as usize);
    }

    /// Adds the next extent of the table; [`Extents::link_free`] puts the free ones on their lists.
    pub(crate) fn push(&mut self, entry: Entry) {
        let state = match entry.state {
            EntryState::FreeUnzeroed => ExtentState::FreeUnzeroed,
            EntryState::FreeZeroed => ExtentState::FreeZeroed,
            // A copy that was cut off. The extent that it was made of is still where it was.
            EntryState::Allocated if entry.incoming => ExtentState::FreeUnzeroed,
            EntryState::Allocated => ExtentState::Allocated,
        };
        self.all.push(Extent {
            stamp: entry.stamp,
            link: entry.logical,
            pins: 0,
            sum: NIL,
            layer: entry.layer,
            state,
            dirty: entry.dirty && !entry.incoming,
            copy: entry.copy,
            birth: entry.birth,
            opened: if entry.open && state == ExtentState::Allocated {
                Opened::Fresh
            } else {
                Opened::Closed
            },
            listed: false,
        });
    }

    /// Applies a record at replay, before the lists are built.
    pub(crate) fn replay(&mut self, extent: u32, entry: Entry) -> bool {
        if extent as usize >= self.all.len() {
            return false;
        }
        self.push(entry);
        let last = self.all.pop().expect("just pushed");
        self.all[extent as usize] = last;
        true
    }

    /// Puts the free extents of `from..` on the free lists, the lowest to be taken first.
    pub(crate) fn link_free(&mut self, from: u32) {
        for extent in (from..self.len()).rev() {
            match self.get(extent).state {
                ExtentState::FreeUnzeroed => self.put_free(extent, false),
                ExtentState::FreeZeroed => self.put_free(extent, true),
                _ => self.allocated += 1,
            }
        }
    }

    pub(crate) fn get(&self, extent: u32) -> &Extent {
        &self.all[extent as usize]
    }

    pub(crate) fn get_mut(&mut self, extent: u32) -> &mut Extent {
        &mut self.all[extent as usize]
    }

    pub(crate) fn put_free(&mut self, extent: u32, zeroed: bool) {
        let (list, state) = if zeroed {
            (&mut self.zeroed, ExtentState::FreeZeroed)
        } else {
            (&mut self.unzeroed, ExtentState::FreeUnzeroed)
        };
        let e = &mut self.all[extent as usize];
        assert_eq!(e.pins, 0, "extent {extent} is given back while I/O is in flight to it");
        e.state = state;
        self.incoming.retain(|&i| i != extent);
        e.layer = 0;
        e.stamp = 0;
        e.opened = Opened::Closed;
        e.birth = 0;
        e.copy = false;
        e.link = list.head;
        list.head = extent;
        list.len += 1;
    }

    /// A free extent, and whether it reads as zeros.
    pub(crate) fn take_free(&mut self) -> Option<(u32, bool)> {
        let zeroed = self.zeroed.len > 0;
        let list = if zeroed { &mut self.zeroed } else { &mut self.unzeroed };
        if list.len == 0 {
            return None;
        }
        let extent = list.head;
        let e = &mut self.all[extent as usize];
        let expected = if zeroed { ExtentState::FreeZeroed } else { ExtentState::FreeUnzeroed };
        assert_eq!(e.state, expected, "extent {extent} is on a free list and not free");
        list.head = e.link;
        list.len -= 1;
        e.state = ExtentState::Taken;
        e.link = 0;
        Some((extent, zeroed))
    }

    /// What the table says of `extent` now. Never more than what is durable: a page may be written at
    /// any time.
    pub(crate) fn entry(&self, extent: u32) -> Entry {
        let e = self.get(extent);
        match e.state {
            ExtentState::FreeZeroed => Entry::free(true),
            ExtentState::FreeUnzeroed
            | ExtentState::Taken
            | ExtentState::Cleaning
            | ExtentState::Quarantined => Entry::free(false),
            ExtentState::Allocated | ExtentState::Moving | ExtentState::Freeing => Entry {
                state: EntryState::Allocated,
                layer: e.layer,
                logical: e.link,
                stamp: e.stamp,
                dirty: e.dirty,
                incoming: self.incoming.contains(&extent),
                copy: e.copy,
                birth: e.birth,
                open: e.opened.is_durable(),
            },
        }
    }

    /// Asserts that each free extent is on its list once. Returns how many are on the lists.
    pub(crate) fn check_lists(&self) -> u32 {
        let mut seen = vec![false; self.all.len()];
        for (list, state) in
            [(&self.zeroed, ExtentState::FreeZeroed), (&self.unzeroed, ExtentState::FreeUnzeroed)]
        {
            let mut at = list.head;
            for _ in 0..list.len {
                let e = self.get(at);
                assert!(!seen[at as usize], "extent {at} is on a free list twice");
                assert_eq!(e.state, state, "extent {at} is on a free list and not free");
                assert_eq!(e.pins, 0, "extent {at} is free with I/O in flight");
                seen[at as usize] = true;
                at = e.link;
            }
            assert_eq!(at, NIL, "a free list goes on past its length");
        }
        for (i, e) in self.all.iter().enumerate() {
            let free = matches!(e.state, ExtentState::FreeZeroed | ExtentState::FreeUnzeroed);
            assert_eq!(free, seen[i], "extent {i} is free and on no list, or the reverse");
        }
        self.free()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Extent)> {
        (0u32..).zip(&self.all)
    }
}

/// Where an extent lies: its first byte.
pub(crate) fn extent_offset(segments: &[Segment], extent: u32) -> u64 {
    let mut first = 0;
    for segment in segments {
        if extent - first < segment.extents {
            return segment.data * crate::disk::BLOCK + u64::from(extent - first) * EXTENT;
        }
        first += segment.extents;
    }
    unreachable!("extent {extent} lies in no segment")
}

/// Where copy A of an extent's checksum page lies, in blocks.
pub(crate) fn sums_address(segments: &[Segment], extent: u32) -> u64 {
    let mut first = 0;
    for segment in segments {
        if extent - first < segment.extents {
            return segment.sums_address(extent - first);
        }
        first += segment.extents;
    }
    unreachable!("extent {extent} lies in no segment")
}

/// The table page, counted over all segments, that an extent's entry is on.
pub(crate) fn page_of(segments: &[Segment], extent: u32) -> u32 {
    let (mut first, mut page) = (0, 0);
    for segment in segments {
        if extent - first < segment.extents {
            return page + (extent - first) / ENTRIES_PER_PAGE;
        }
        first += segment.extents;
        page += segment.pages();
    }
    unreachable!("extent {extent} lies in no segment")
}

/// Where a table page lies.
pub(crate) struct PagePlace {
    pub(crate) segment: Segment,
    /// Its index within the segment.
    pub(crate) local: u32,
    /// Its first extent.
    pub(crate) first: u32,
}

pub(crate) fn page_place(segments: &[Segment], page: u32) -> PagePlace {
    let (mut first, mut before) = (0, 0);
    for &segment in segments {
        if page - before < segment.pages() {
            let local = page - before;
            return PagePlace { segment, local, first: first + local * ENTRIES_PER_PAGE };
        }
        first += segment.extents;
        before += segment.pages();
    }
    unreachable!("page {page} lies in no segment")
}
