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
