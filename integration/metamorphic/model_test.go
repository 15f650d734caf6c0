package metamorphic

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/google/uuid"

	"scoria/driver/block"
)

const (
	sector     = block.SectorSize
	cluster    = block.ClusterSize
	perCluster = cluster / sector
)

// version is what a sector holds: the seed of its bytes, 0 for zeroes.
type version = uint64

// noise is where the bytes of sectors are taken from.
var noise = func() []byte {
	rng := rand.New(rand.NewPCG(3, 5))
	b := make([]byte, 1<<16+sector)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}()

// A sector begins with its version and where in the volume it is.
const (
	placeBits  = 24
	maxVersion = 1<<(64-placeBits) - 1
)

func noiseOf(head uint64) []byte {
	at := (head * 0x9e3779b97f4a7c15) >> 48
	return noise[at : at+sector-8]
}

// stamp fills p, whole sectors from a place on, with a version.
func stamp(p []byte, place uint64, v version) {
	for ; len(p) > 0; p, place = p[sector:], place+1 {
		if v == 0 {
			clear(p[:sector])
			continue
		}
		head := v<<placeBits | place
		binary.LittleEndian.PutUint64(p, head)
		copy(p[8:sector], noiseOf(head))
	}
}

// readStamps is the inverse of stamp, for whatever versions there are.
func readStamps(p []byte, place uint64) ([]version, error) {
	list := make([]version, 0, len(p)/sector)
	for ; len(p) > 0; p, place = p[sector:], place+1 {
		head := binary.LittleEndian.Uint64(p)
		switch {
		case head != 0 && head&(1<<placeBits-1) == place && bytes.Equal(p[8:sector], noiseOf(head)):
			list = append(list, head>>placeBits)
		case bytes.Equal(p[:sector], zeroes[:]):
			list = append(list, 0)
		default:
			return nil, fmt.Errorf("P5: sector %d is torn or another: % x…", place, p[:16])
		}
	}
	return list, nil
}

var zeroes [sector]byte

// cell is a cluster as one request left it. Nobody changes it, so two states that have
// the same one have it in common. A nil cell is not mapped.
type cell struct {
	owner int // volume whose log it is in
	now   [perCluster]version
}

var unmapped [perCluster]version

func (c *cell) versions() *[perCluster]version {
	if c == nil {
		return &unmapped
	}
	return &c.now
}

// step is how the log grew by one piece; of several cells in it, any may have come first.
type step map[int]*cell

// snapshot is a state that is kept.
type snapshot struct {
	name  string
	made  string // the name that it was made with, if that is another
	id    uuid.UUID
	cells []*cell
}

// kinship is a snapshot that a volume may read from.
type kinship struct {
	volume   int
	snapshot uuid.UUID
	// maybe: the volume was flattened, and older snapshots of it may still need it.
	maybe bool
}

// volume is the model of one.
type volume struct {
	id    int
	name  string
	block uint64 // sectors of a logical block
	cells []*cell
	snaps []*snapshot
	kin   []kinship
	// former are kinships that a flatten has ended, which an older state of the volume
	// in the object store still has.
	former []kinship

	template, readOnly bool
	// fuzzy: which cells are its own is not known, after a flatten that was interrupted.
	fuzzy bool

	// flushed is the state that a loss of power leaves at least, steps what was done
	// since, and answered how many of them a kill leaves.
	flushed  []*cell
	steps    []step
	answered int
}

func (v *volume) clone() *volume {
	c := *v
	c.cells, c.snaps, c.kin = slices.Clone(v.cells), slices.Clone(v.snaps), slices.Clone(v.kin)
	c.former = slices.Clone(v.former)
	c.flushed, c.steps = slices.Clone(v.flushed), slices.Clone(v.steps)
	return &c
}

func (v *volume) sectors() uint64 { return uint64(len(v.cells)) * perCluster }

func (v *volume) find(snap string) (*snapshot, int) {
	i := slices.IndexFunc(v.snaps, func(s *snapshot) bool { return s.name == snap })
	if i < 0 {
		return nil, i
	}
	return v.snaps[i], i
}

// put notes steps that are about to be done.
func (v *volume) put(steps ...step) {
	for _, s := range steps {
		for at, c := range s {
			v.cells[at] = c
		}
	}
	v.steps = append(v.steps, steps...)
}

// ack says that everything that was noted is done.
func (v *volume) ack() { v.answered = len(v.steps) }

// settle says that everything is durable.
func (v *volume) settle() {
	v.flushed, v.steps, v.answered = slices.Clone(v.cells), nil, 0
}

// overlay returns the cell of cluster at with sectors of a request in it.
func (v *volume) overlay(at int, off, n uint64, to version) *cell {
	c := &cell{owner: v.id, now: *v.cells[at].versions()}
	first := uint64(at) * perCluster
	for s := max(off, first); s < min(off+n, first+perCluster); s++ {
		c.now[s-first] = to
	}
	return c
}

// clusters returns the range of clusters that sectors touch.
func clusters(off, n uint64) (first, end int) {
	return int(off / perCluster), int((off + n + perCluster - 1) / perCluster)
}

// writing returns the steps of a write, in the order in which they are logged.
func (v *volume) writing(off, n uint64, to version) []step {
	first, end := clusters(off, n)
	var list []step
	for at := first; at < end; at++ {
		list = append(list, step{at: v.overlay(at, off, n, to)})
	}
	return list
}

// clearing returns the steps of a discard or write-zeroes: parts of clusters first,
// then all whole ones in one.
func (v *volume) clearing(off, n uint64) []step {
	var parts []step
	whole := step{}
	first, end := clusters(off, n)
	for at := first; at < end; at++ {
		switch from := uint64(at) * perCluster; {
		case v.cells[at] == nil:
		case from >= off && from+perCluster <= off+n:
			whole[at] = nil
		default:
			parts = append(parts, step{at: v.overlay(at, off, n, 0)})
		}
	}
	if len(whole) > 0 {
		parts = append(parts, whole)
	}
	return parts
}

// resize changes the length of what is there and of what is durable.
func (v *volume) resize(n int) {
	fit := func(list []*cell) []*cell {
		if n <= len(list) {
			return slices.Clone(list[:n])
		}
		return append(slices.Clone(list), make([]*cell, n-len(list))...)
	}
	v.cells, v.flushed = fit(v.cells), fit(v.flushed)
}

// model is all volumes.
type model struct {
	volumes map[string]*volume
	born    int
}

func newModel() *model { return &model{volumes: map[string]*volume{}} }

func (m *model) clone() *model {
	c := &model{volumes: map[string]*volume{}, born: m.born}
	for name, v := range m.volumes {
		c.volumes[name] = v.clone()
	}
	return c
}

func (m *model) names() []string { return slices.Sorted(maps.Keys(m.volumes)) }

// add makes an empty volume.
func (m *model) add(name string, size int, blockSectors uint64) *volume {
	m.born++
	v := &volume{id: m.born, name: name, block: blockSectors, cells: make([]*cell, size)}
	v.settle()
	m.volumes[name] = v
	return v
}

// dependents says whether volumes read from v, or from its snapshot if that is not Nil:
// surely, or perhaps.
func (m *model) dependents(v *volume, snap uuid.UUID) (sure, perhaps bool) {
	for _, w := range m.volumes {
		for _, k := range w.kin {
			if k.volume == v.id && (snap == uuid.Nil || k.snapshot == snap) {
				sure, perhaps = sure || !k.maybe && w.reads(k.volume), true
			}
		}
	}
	return sure, perhaps
}

// independent says that a volume reads from no other, though it may be found to after the
// registry was lost.
func (v *volume) independent() {
	for _, k := range v.kin {
		v.former = append(v.former, kinship{volume: k.volume, snapshot: k.snapshot, maybe: true})
	}
	v.kin = nil
}

// rebuilt is what a registry that was made from the storage daemons knows of a volume:
// snapshots have the names that they were made with, or, where that is taken, one derived
// from it.
func (v *volume) rebuilt() {
	taken := map[string]bool{}
	for i, s := range v.snaps {
		other := *s
		other.name, other.made = cmp.Or(s.made, s.name), ""
		base := other.name
		for n := 2; taken[other.name]; n++ {
			other.name, other.made = fmt.Sprintf("%s-%d", base, n), base
		}
		taken[other.name] = true
		v.snaps[i] = &other
	}
	v.kin = append(v.kin, v.former...)
}

// reads reports whether a clone surely has clusters of an ancestor. One that has not may
// be independent of it by now.
func (v *volume) reads(ancestor int) bool {
	has := func(c *cell) bool { return c != nil && c.owner == ancestor }
	return !v.fuzzy && ancestor != v.id && (slices.ContainsFunc(v.cells, has) ||
		slices.ContainsFunc(v.snaps, func(s *snapshot) bool { return slices.ContainsFunc(s.cells, has) }))
}

// observed is what was found of a volume.
type observed struct {
	name     string
	template bool
	readOnly bool
	data     []version
	snaps    []observedSnapshot
}

type observedSnapshot struct {
	name string
	id   uuid.UUID
	data []version
}

// ending says what may be lost of the requests since the last flush.
type ending int

const (
	nothingLost    ending = iota // the daemon is the same or was stopped in order
	unansweredLost               // it was killed
	unflushedLost                // the power was lost
)

// match compares what was found with the model, whose last operations may be lost as
// the ending says, and makes the model what was found.
func (m *model) match(found []*observed, e ending) error {
	var errs []error
	seen := map[string]bool{}
	for _, o := range found {
		seen[o.name] = true
		v := m.volumes[o.name]
		if v == nil {
			errs = append(errs, fmt.Errorf("volume %s is there", o.name))
			continue
		}
		if err := v.match(o, e); err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", o.name, err))
		}
	}
	for _, name := range m.names() {
		if !seen[name] {
			errs = append(errs, fmt.Errorf("volume %s is gone", name))
		}
	}
	return errors.Join(errs...)
}

func (v *volume) match(o *observed, e ending) error {
	if v.template != o.template || v.readOnly != o.readOnly {
		return fmt.Errorf("template %v, read-only %v; want %v, %v", o.template, o.readOnly, v.template, v.readOnly)
	}
	var has, want []string
	for _, s := range o.snaps {
		has = append(has, s.name)
	}
	for _, s := range v.snaps {
		want = append(want, s.name)
	}
	if !slices.Equal(has, want) {
		return fmt.Errorf("it has snapshots %q, want %q", has, want)
	}
	for i, s := range v.snaps {
		if s.id == uuid.Nil {
			s.id = o.snaps[i].id // it was being made when the daemon died
		}
		if s.id != o.snaps[i].id {
			return fmt.Errorf("snapshot %s has another ID", s.name)
		}
		if diff := differing(s.cells, o.snaps[i].data); len(diff) > 0 {
			return fmt.Errorf("snapshot %s: %s", s.name, describe(diff, s.cells, o.snaps[i].data))
		}
	}
	if len(o.data) != int(v.sectors()) {
		return fmt.Errorf("it has %d sectors, want %d", len(o.data), v.sectors())
	}
	switch e {
	case nothingLost:
		if diff := differing(v.cells, o.data); len(diff) > 0 {
			return errors.New(describe(diff, v.cells, o.data))
		}
		return nil
	case unansweredLost:
		base := slices.Clone(v.flushed)
		for _, s := range v.steps[:v.answered] {
			s.apply(base)
		}
		if err := v.cut(base, v.answered, o.data); err != nil {
			return fmt.Errorf("P3: %w", err)
		}
		v.answered = len(v.steps)
		return nil
	}
	if err := v.cut(slices.Clone(v.flushed), 0, o.data); err != nil {
		return fmt.Errorf("P1 or P2: %w", err)
	}
	v.settle()
	return nil
}

func (s step) apply(cells []*cell) {
	for at, c := range s {
		if at < len(cells) { // else it was cut off since
			cells[at] = c
		}
	}
}

// cut finds after how many steps, from so many on, the volume was as data; the last of
// them may have been done in part. state is the volume after those. Where what follows
// makes no difference to the contents, it is not known whether it was done.
func (v *volume) cut(state []*cell, from int, data []version) error {
	same := func(at int, c *cell) bool {
		return at >= len(state) || slices.Equal(c.versions()[:], data[at*perCluster:][:perCluster])
	}
	wrong := differing(state, data)
	k := from
	for ; len(wrong) > 0 && k < len(v.steps); k++ {
		s := v.steps[k]
		if len(s) > 1 && all(wrong, func(at int) bool { c, has := s[at]; return has && same(at, c) }) {
			part := step{}
			for at, c := range s {
				if same(at, c) {
					part[at] = c
				}
			}
			if len(part) < len(s) {
				v.fuzzy = v.fuzzy || len(part) > len(wrong) || v.hides(k, part, same)
				part.apply(state)
				v.steps, v.cells = append(v.steps[:k:k], part), state
				return nil
			}
		}
		s.apply(state)
		for at, c := range s {
			if same(at, c) {
				delete(wrong, at)
			} else {
				wrong[at] = true
			}
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("no part of the %d steps since the last flush explains it, of which %d are surely there: %s", len(v.steps), from, describe(wrong, state, data))
	}
	for at, c := range v.stepAt(k) {
		v.fuzzy = v.fuzzy || same(at, c)
	}
	v.steps, v.cells = v.steps[:k:k], state
	return nil
}

// hides reports whether step k may have been done whole instead of in part, as steps behind
// it have what is found in all other clusters of it.
func (v *volume) hides(k int, part step, same func(int, *cell) bool) bool {
	for at := range v.steps[k] {
		if _, has := part[at]; !has && !slices.ContainsFunc(v.steps[k+1:], func(s step) bool { c, has := s[at]; return has && same(at, c) }) {
			return false
		}
	}
	return true
}

func (v *volume) stepAt(k int) step {
	if k < len(v.steps) {
		return v.steps[k]
	}
	return nil
}

func all(set map[int]bool, fn func(int) bool) bool {
	for at := range set {
		if !fn(at) {
			return false
		}
	}
	return true
}

// differing lists the clusters of which the contents differ.
func differing(cells []*cell, data []version) map[int]bool {
	diff := map[int]bool{}
	for at := range max(len(cells), len(data)/perCluster) {
		if at >= len(cells) || at >= len(data)/perCluster || !slices.Equal(cells[at].versions()[:], data[at*perCluster:][:perCluster]) {
			diff[at] = true
		}
	}
	return diff
}

func describe(diff map[int]bool, want []*cell, got []version) string {
	list := slices.Sorted(maps.Keys(diff))
	at := list[0]
	w, g := "nothing", "nothing"
	if at < len(want) {
		w = fmt.Sprint(*want[at].versions())
	}
	if at < len(got)/perCluster {
		g = fmt.Sprint(got[at*perCluster:][:perCluster])
	}
	return fmt.Sprintf("%d clusters differ: %v; cluster %d has versions %s, want %s", len(list), list[:min(len(list), 20)], at, g, w)
}
