// Package store keeps the pages and blobs of snapshots: content-addressed,
// deduplicated, compressed, optionally encrypted, in immutable packs on any
// bucket that gocloud.dev/blob can open. A plain directory is the default.
//
// What it owns:
//
//   - the byte format of packs, page tables and the store's own description
//     (written down in docs/store.md, which is the authority);
//   - the index that tells which page lies where, about 30 bytes of memory a
//     page (see [Stats.IndexBytes]);
//   - sessions: everything one cut writes. A session's pages become visible
//     to others when it commits, so that an abort may delete its packs;
//   - reading back with every byte verified against its hash before it is
//     handed out, checking, and garbage collection;
//   - documents: the few small named objects, written whole or not at all, by
//     which packages above make a snapshot visible (see package catalog).
//
// It knows nothing of hypervisors, slices or networks. [PageWriter] and
// [PageReader] have the method sets of a migration codec's page sink and page
// source, so that a capture streams into a session and a restore streams out
// of the store without either package knowing the other.
package store
