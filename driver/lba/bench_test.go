package lba

import (
	"math/rand/v2"
	"testing"
)

const benchClusters = 64 << 30 / 4096 // 64 GiB

// residentMap returns a map of 64 GiB with every leaf in memory.
func residentMap(b *testing.B) *Map {
	m := newMap(b, benchClusters)
	for lba := uint64(0); lba < benchClusters; lba += LeafClusters {
		m.Set(lba, 1)
	}
	return m
}

func BenchmarkSetRandom(b *testing.B) {
	m := residentMap(b)
	rng := rand.New(rand.NewPCG(1, 2))
	loc := Location(2)
	b.ReportAllocs()
	for b.Loop() {
		m.Set(rng.Uint64()%benchClusters, loc)
		loc += 1 << locClusterShift
	}
}

func BenchmarkSetSequential(b *testing.B) {
	m := residentMap(b)
	loc, lba := Location(2), uint64(0)
	b.ReportAllocs()
	for b.Loop() {
		m.Set(lba%benchClusters, loc)
		loc += 1 << locClusterShift
		lba++
	}
}

func BenchmarkGetRandom(b *testing.B) {
	m := residentMap(b)
	rng := rand.New(rand.NewPCG(1, 2))
	var sum Location
	b.ReportAllocs()
	for b.Loop() {
		loc, _ := m.Get(rng.Uint64() % benchClusters)
		sum += loc
	}
	_ = sum
}

// BenchmarkGetDependent has each address depend on the result before: the
// latency of one Get, cache misses and all.
func BenchmarkGetDependent(b *testing.B) {
	m := residentMap(b)
	rng := rand.New(rand.NewPCG(1, 2))
	var last Location
	b.ReportAllocs()
	for b.Loop() {
		loc, _ := m.Get((rng.Uint64() + uint64(last)) % benchClusters)
		last = loc
	}
}

func BenchmarkRandomBase(b *testing.B) {
	rng := rand.New(rand.NewPCG(1, 2))
	var sum uint64
	for b.Loop() {
		sum += rng.Uint64() % benchClusters
	}
	_ = sum
}

func BenchmarkGetRange16(b *testing.B) {
	m := residentMap(b)
	rng := rand.New(rand.NewPCG(1, 2))
	var dst [16]Location
	b.ReportAllocs()
	for b.Loop() {
		m.GetRange(rng.Uint64()%benchClusters&^15, dst[:])
	}
}

// BenchmarkSetFirstInGeneration is the slow path: each write is the first to
// its leaf since a checkpoint began, and a running checkpoint needs a copy.
func BenchmarkSetFirstInGeneration(b *testing.B) {
	m := residentMap(b)
	const leaves = benchClusters / LeafClusters
	loc := Location(2)
	c := m.BeginCheckpoint()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%leaves == 0 {
			b.StopTimer()
			c.Abort()
			c = m.BeginCheckpoint()
			b.StartTimer()
		}
		m.Set(uint64(i%leaves)*LeafClusters, loc)
		loc += 1 << locClusterShift
	}
	b.StopTimer()
	c.Abort()
}

// BenchmarkCheckpoint64GiB writes and commits all leaves of 64 GiB, nowhere.
func BenchmarkCheckpoint64GiB(b *testing.B) {
	m := residentMap(b)
	b.SetBytes(benchClusters * 8)
	for object := uint32(1); b.Loop(); object++ {
		c := m.BeginCheckpoint()
		page := uint32(0)
		_ = c.WritePages(func(uint64, []byte) (PageAddr, error) {
			page++
			return MakePageAddr(object, page), nil
		})
		c.Commit()
		b.StopTimer()
		m.MarkObjectDirty(background, nil, object)
		b.StartTimer()
	}
}

func BenchmarkClearEmpty64TiB(b *testing.B) {
	m := newMap(b, MaxClusters)
	for b.Loop() {
		m.Clear(0, MaxClusters, nil)
	}
}

func BenchmarkClearAndSet1GiB(b *testing.B) {
	m := newMap(b, benchClusters)
	var freed uint64
	for b.Loop() {
		for lba := uint64(0); lba < spanLeaves*LeafClusters; lba++ {
			m.Set(lba, 1)
		}
		m.Clear(0, spanLeaves*LeafClusters, func(Location) { freed++ })
	}
}
