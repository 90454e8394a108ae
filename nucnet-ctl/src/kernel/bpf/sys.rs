//! The commands of bpf(2) that aya 0.14 has no call for: batches of map entries, what a link is
//! attached to, exchange of a link's program, detachment.

use std::{
    ffi::CString,
    io, mem,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya::Pod;
use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info, bpf_link_type, bpf_prog_info};
use nix::libc;

use crate::kernel::fault::{self, Operation};

/// `ENOTSUPP` of the kernel's inside, which bpf(2) lets out: the map has no such operation.
const ENOTSUPP: i32 = 524;

fn bpf(command: bpf_cmd, attributes: &mut bpf_attr) -> io::Result<i64> {
    // SAFETY: `attributes` is a whole `bpf_attr`, unused parts zero; every pointer in it was
    // taken by the callers below from memory that outlives this call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attributes),
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Called before every change by bpf(2), aya's calls included.
pub(super) fn before_change() -> io::Result<()> {
    Ok(fault::before(Operation::Map)?)
}

fn no_attributes() -> bpf_attr {
    // SAFETY: `bpf_attr` is a union of structs of integers: zero is valid.
    unsafe { mem::zeroed() }
}

/// Opens what is pinned at `path`.
pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = no_attributes();
    attributes.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    let fd = bpf(bpf_cmd::BPF_OBJ_GET, &mut attributes)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkTarget {
    /// An interface by TCX. Index 0: the interface is gone.
    Interface(u32),
    /// A cgroup by its id, the inode number of its directory. 0: the cgroup is gone.
    Cgroup(u64),
    /// Something that nucnet does not attach to.
    Other,
}

/// A link as the kernel describes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkInfo {
    pub(super) program: u32,
    pub(super) target: LinkTarget,
}

/// Has the kernel describe what is behind a descriptor.
fn describe<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attributes = no_attributes();
    attributes.info.bpf_fd = object.as_raw_fd() as u32;
    attributes.info.info_len = size_of::<T>() as u32;
    attributes.info.info = std::ptr::from_mut(info) as u64;
    bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attributes).map(drop)
}

/// The kernel's number for a program.
pub(super) fn program_id(program: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: integers only: zero is valid.
    let mut info: bpf_prog_info = unsafe { mem::zeroed() };
    describe(program, &mut info)?;
    Ok(info.id)
}

pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    // SAFETY: integers only: zero is valid.
    let mut info: bpf_link_info = unsafe { mem::zeroed() };
    describe(link, &mut info)?;
    // SAFETY: both are plain integers in a union that the kernel filled according to `type_`;
    // what it did not fill is zero.
    let target = unsafe {
        if info.type_ == bpf_link_type::BPF_LINK_TYPE_TCX as u32 {
            LinkTarget::Interface(info.__bindgen_anon_1.tcx.ifindex)
        } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32 {
            LinkTarget::Cgroup(info.__bindgen_anon_1.cgroup.cgroup_id)
        } else {
            LinkTarget::Other
        }
    };
    Ok(LinkInfo {
        program: info.prog_id,
        target,
    })
}

/// Exchanges the program of a link; no packet passes without one.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    before_change()?;
    let mut attributes = no_attributes();
    attributes.link_update.link_fd = link.as_raw_fd() as u32;
    attributes.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attributes).map(drop)
}

/// Detaches a link now. Removing its pin alone does so at some later time, in a work queue.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    before_change()?;
    let mut attributes = no_attributes();
    attributes.link_detach.link_fd = link.as_raw_fd() as u32;
    bpf(bpf_cmd::BPF_LINK_DETACH, &mut attributes).map(drop)
}

/// Whether `error` says that the kernel, or this kind of map, does not know batches.
pub(super) fn is_unsupported_batch(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EINTR | ENOTSUPP)
    )
}

/// Calls `visit` with every entry of a map, some thousands of entries a system call. An entry
/// that comes or goes meanwhile may or may not be seen; none is seen twice in a hash map that
/// nobody changes.
///
/// Fails with what [`is_unsupported_batch`] recognizes before the first entry is visited, if
/// batches cannot be used.
pub(super) fn for_each_entry<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    mut visit: impl FnMut(&K, &V),
) -> io::Result<()> {
    let mut capacity = 4096;
    let mut keys: Vec<K> = Vec::with_capacity(capacity);
    let mut values: Vec<V> = Vec::with_capacity(capacity);
    // Where the next batch starts: a bucket's number (hash) or a key (every other map).
    let mut position = vec![0u8; size_of::<K>().max(size_of::<u32>())];
    let mut next_position = position.clone();
    let mut first = true;
    loop {
        let mut attributes = no_attributes();
        attributes.batch.map_fd = map.as_raw_fd() as u32;
        attributes.batch.in_batch = if first { 0 } else { position.as_ptr() as u64 };
        attributes.batch.out_batch = next_position.as_mut_ptr() as u64;
        attributes.batch.keys = keys.as_mut_ptr() as u64;
        attributes.batch.values = values.as_mut_ptr() as u64;
        attributes.batch.count = capacity as u32;
        let result = bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attributes);
        let last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // A single bucket holds more than fits.
                Some(libc::ENOSPC) => {
                    capacity *= 2;
                    keys = Vec::with_capacity(capacity);
                    values = Vec::with_capacity(capacity);
                    continue;
                }
                _ => return Err(error),
            },
        };
        // SAFETY: the kernel filled that many of both and wrote back the count, which is at
        // most the capacity that it was given; `Pod` types are valid whatever their bits.
        let (filled_keys, filled_values) = unsafe {
            let count = (attributes.batch.count as usize).min(capacity);
            keys.set_len(count);
            values.set_len(count);
            (&keys, &values)
        };
        for (key, value) in filled_keys.iter().zip(filled_values) {
            visit(key, value);
        }
        if last {
            return Ok(());
        }
        mem::swap(&mut position, &mut next_position);
        first = false;
    }
}

/// Writes entries, as many a call as the kernel takes. Returns how many are in; on error the
/// one after them failed.
pub(super) fn update_entries<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> (usize, io::Result<()>) {
    assert_eq!(keys.len(), values.len());
    if let Err(error) = before_change() {
        return (0, Err(error));
    }
    let mut attributes = no_attributes();
    attributes.batch.map_fd = map.as_raw_fd() as u32;
    attributes.batch.keys = keys.as_ptr() as u64;
    attributes.batch.values = values.as_ptr() as u64;
    attributes.batch.count = keys.len() as u32;
    let result = bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attributes).map(drop);
    (done(&result, &attributes, keys.len()), result)
}

/// Removes entries. Returns how many went; on error the one after them could not be removed.
pub(super) fn delete_entries<K: Pod>(map: BorrowedFd<'_>, keys: &[K]) -> (usize, io::Result<()>) {
    if let Err(error) = before_change() {
        return (0, Err(error));
    }
    let mut attributes = no_attributes();
    attributes.batch.map_fd = map.as_raw_fd() as u32;
    attributes.batch.keys = keys.as_ptr() as u64;
    attributes.batch.count = keys.len() as u32;
    let result = bpf(bpf_cmd::BPF_MAP_DELETE_BATCH, &mut attributes).map(drop);
    (done(&result, &attributes, keys.len()), result)
}

/// How many entries of `all` a batch dealt with. A kernel that refuses the command as such
/// leaves the count as it was.
fn done(result: &io::Result<()>, attributes: &bpf_attr, all: usize) -> usize {
    // SAFETY: an integer in a union that was zeroed, and set, as a batch.
    let count = unsafe { attributes.batch.count } as usize;
    match result {
        Ok(()) => all,
        Err(error) if is_unsupported_batch(error) && count == all => 0,
        Err(_) => count.min(all),
    }
}
