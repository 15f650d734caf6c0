// Package cache keeps clusters that were read back from disk or store: a tier in
// RAM and behind it, if one is attached, a tier on an SSD. All volumes of a
// daemon share one Cache.
//
// # Keys
//
// A cluster is found by its location, which never holds anything else, so
// nothing is ever updated and a second Put of a key changes nothing. The tag
// says whose location it is. A tag must never be used again after DropVolume,
// nor for a volume that was closed and opened anew: what was under way may
// still arrive under it. Counting tags up in the process is enough.
//
// # RAM tier
//
// Shards by hash of the key; in each a table of slots of 4 KiB with the policy
// S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP
// 2023): a tenth of the slots is a queue for newcomers, and who was not read
// twice when its turn comes leaves, remembered only by a fingerprint (ghost); who
// was read twice or comes back moves to the main queue, which goes round like a
// clock. So a scan passes through the small queue and leaves the rest alone.
//
// Slots and tables are mapped outside the Go heap: they neither take part in
// garbage collection nor delay it. The budget counts the slots; the tables add
// about 1.2 %. Get and Put allocate nothing and make no system call. A shard's
// mutex is held while its table is searched or changed, never while a cluster is
// copied: a copy pins its slot, and a pinned slot is not evicted.
//
// # SSD tier
//
// A file of fixed size, written as a ring in batches of 64 clusters; the index
// and a CRC32C per cluster are in RAM (some 28 bytes per slot, outside the heap),
// so after a restart the tier is empty and the file's old bytes mean nothing. It
// is fed with clusters that leave RAM after having been read more than once. When
// the writer does not keep up they are dropped instead. What is read is verified;
// a wrong cluster is forgotten, counted and reported as a miss. A tier that fails
// 16 times in a row is switched off, and Stats says why.
//
// # Locks and goroutines
//
// Cache.configMu, then ssd.life, then ssd.batchMu or ssd.mu; shard.mu is taken
// under configMu or nothing. One goroutine, "ssd writer", runs from AttachSSD to
// Close.
package cache
