package vfs

import (
	"maps"
	"math/rand/v2"
	"slices"
)

// journalLimitBytes bounds the unsynced data of one file. Beyond it the oldest
// changes become durable, as a kernel writes back what has been dirty for long.
const journalLimitBytes = 64 << 20

// node is a file or a directory of a Mem; Mem.mu guards it.
type node struct {
	dir *directory // nil: a file

	// cur is what reads see and durable what a loss of power can't touch; they
	// differ by the journal, in the pages of dirty only.
	cur, durable content
	dirty        map[int64]struct{}
	journal      []change
	journalBytes int
	// diverged: a Sync failed, so cur holds data that are neither durable nor in
	// the journal any more, and never become durable.
	diverged bool

	memory *memory // of a mapped file, which keeps its contents there
	links  int     // names in directories
	opens  int     // open Files
	locked bool
}

// directory maps names to nodes. tx ties the two halves of a rename together: a
// loss of power keeps both or neither.
type directory struct {
	cur, durable map[string]*node
	journal      []nameChange
}

type nameChange struct {
	name string
	node *node // nil: the name was removed
	tx   *nameTx
}

// nameTx is one operation on names. to is the directory that a rename between
// directories added its name to.
type nameTx struct{ to *directory }

func newFile() *node {
	return &node{cur: newContent(), durable: newContent(), dirty: make(map[int64]struct{})}
}

func newDirectory() *node {
	return &node{dir: &directory{cur: make(map[string]*node), durable: make(map[string]*node)}}
}

// set changes a name now and, after the next sync, for good.
func (d *directory) set(name string, n *node, tx *nameTx) {
	if n == nil {
		delete(d.cur, name)
	} else {
		d.cur[name] = n
	}
	d.journal = append(d.journal, nameChange{name, n, tx})
}

// sync makes the names durable. A rename out of this directory is made durable
// at its other end too, since no file system loses a file by a rename.
func (d *directory) sync() {
	journal := d.journal
	d.journal = nil
	d.durable = maps.Clone(d.cur)
	for i := range journal {
		if to := journal[i].tx.to; to != nil && to != d {
			to.sync()
		}
	}
}

// markDirty notes the pages of cur that a change of [off, end) touches.
func (n *node) markDirty(off, end int64) {
	n.cur.eachPage(off, end, func(i int64) { n.dirty[i] = struct{}{} })
}

// record appends to the journal what has been done to cur.
func (n *node) record(ch change) {
	n.journal = append(n.journal, ch)
	n.journalBytes += len(ch.data)
	if n.journalBytes > journalLimitBytes {
		n.writeBackOldest(len(n.journal) / 2)
	}
}

// writeBackOldest makes the first count changes of the journal durable.
func (n *node) writeBackOldest(count int) {
	for i := range n.journal[:count] {
		n.durable.apply(&n.journal[i])
		n.journalBytes -= len(n.journal[i].data)
	}
	n.journal = append([]change(nil), n.journal[count:]...)
}

// sync makes cur durable.
func (n *node) sync() {
	if n.diverged {
		n.writeBackOldest(len(n.journal))
		return
	}
	for i := range n.dirty {
		if p := n.cur.pages[i]; p != nil {
			n.durable.share(i, p)
		} else {
			delete(n.durable.pages, i)
		}
	}
	n.durable.size = n.cur.size
	n.forgetJournal()
}

func (n *node) forgetJournal() {
	n.journal, n.journalBytes = nil, 0
	clear(n.dirty)
}

// failSync is a sync that met an I/O error: some of the journal reached the
// disk, the rest never will, and each dirty page stays in the cache, now clean,
// or is forgotten there so that reads see the disk's.
func (n *node) failSync(rng *rand.Rand) {
	var dirty []int64
	if n.diverged {
		dirty = slices.Sorted(maps.Keys(n.cur.pages))
	} else {
		dirty = slices.Sorted(maps.Keys(n.dirty))
	}
	n.durable.survive(n.journal, rng)
	n.diverged = true
	n.forgetJournal()
	for _, i := range dirty {
		if i*pageSize >= n.cur.size || rng.IntN(2) == 0 {
			continue
		}
		if p := n.durable.pages[i]; p != nil {
			n.cur.share(i, p)
		} else {
			delete(n.cur.pages, i)
		}
	}
}

// unused says that nothing refers to the file any more.
func (n *node) unused() bool { return n.dir == nil && n.links == 0 && n.opens == 0 }
