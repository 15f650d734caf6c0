package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"scoria/alba"
	"scoria/alba/erasure"
)

// boundFiles write the bytes of an upload to as many files at once as it has fragments.
type boundFiles struct {
	dir       string
	k, m      int
	fragments [][]byte // of the first chunk, then of the next: data, then parity
}

func (b *bench) diskFiles(dir string, c uploadCase, data []byte) *boundFiles {
	f := &boundFiles{dir: dir, k: c.k, m: c.m}
	l := alba.Layout{K: c.k, M: c.m, FragmentBytes: alba.PlanFragment(int64(len(data)), c.k, alba.DefaultFragment, alba.BlockSize), Stored: int64(len(data)), Unit: alba.BlockSize}
	for i := range l.Chunks() {
		n := l.FragmentLen(i)
		for shard := range c.k + c.m {
			// Parity is any bytes; the last chunk's fragments begin where there are enough.
			from := min(i*int(l.ChunkBytes())+shard%c.k*n, len(data)-n)
			f.fragments = append(f.fragments, data[from:from+n])
		}
	}
	return f
}

func (f *boundFiles) name(i int) string { return filepath.Join(f.dir, fmt.Sprint("bound-", i)) }

// write writes each file and syncs it.
func (f *boundFiles) write() error {
	var g errgroup.Group
	for i, p := range f.fragments {
		g.Go(func() error {
			file, err := f.create(i, len(p))
			if err != nil {
				return err
			}
			defer file.Close()
			if _, err := file.Write(p); err != nil {
				return err
			}
			return unix.Fdatasync(int(file.Fd()))
		})
	}
	return g.Wait()
}

// create makes a file, to be written through the page cache, which is the faster way
// here, into room that is reserved.
func (f *boundFiles) create(i, size int) (*os.File, error) {
	file, err := os.Create(f.name(i))
	if err != nil {
		return nil, err
	}
	if err := unix.Fallocate(int(file.Fd()), 0, 0, int64(size)); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		file.Close()
		return nil, err
	}
	return file, nil
}

func (f *boundFiles) remove() error {
	for i := range f.fragments {
		if err := os.Remove(f.name(i)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) timedEncoding(ctx context.Context, c uploadCase, data []byte) (sample, error) {
	codec, err := erasure.CodecFor(c.k, c.m)
	if err != nil {
		return sample{}, err
	}
	shard := len(data) / c.k &^ 4095
	shards := make([][]byte, c.k+c.m)
	for i := range shards {
		if i < c.k {
			shards[i] = data[i*shard : (i+1)*shard]
		} else {
			shards[i] = make([]byte, shard)
		}
	}
	return b.timed(ctx, len(data), func() error { return codec.Encode(shards) }, nil)
}

// boundNet uploads the bytes of boundFiles as a program would that does nothing else:
// it computes the parity, sends each shard's fragments by a loopback TCP connection of
// its own straight from the source's memory, and a receiver at the other end of each
// writes them to the files in pieces that stay in the CPU's cache, has others synced
// meanwhile, and says of each when it is durable. So erasure coding, network and disks
// share this process's CPUs, as they do in the store. There are no checksums, no
// key-value store, no manifest and no copy of the source.
type boundNet struct {
	data   int            // shards
	codec  *erasure.Codec // nil without parity
	chunks [][][]byte     // fragments: data, then parity
	conns  []net.Conn     // one per shard
	close  func()
}

// boundPiece is what a receiver reads and writes at a time, bytes.
const boundPiece = 256 << 10

func newBoundNet(f *boundFiles) (n *boundNet, err error) {
	n = &boundNet{data: f.k}
	var closers []func() error
	n.close = func() {
		for _, c := range closers {
			_ = c()
		}
	}
	defer func() {
		if err != nil {
			n.close()
		}
	}()
	if f.m > 0 {
		if n.codec, err = erasure.CodecFor(f.k, f.m); err != nil {
			return nil, err
		}
	}
	for all := f.fragments; len(all) > 0; all = all[f.k+f.m:] {
		shards := append([][]byte(nil), all[:f.k+f.m]...)
		for i := f.k; i < len(shards); i++ {
			shards[i] = make([]byte, len(shards[i]))
		}
		n.chunks = append(n.chunks, shards)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	for range f.k + f.m {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			return nil, err
		}
		n.conns, closers = append(n.conns, c), append(closers, c.Close)
		s, err := ln.Accept()
		if err != nil {
			return nil, err
		}
		closers = append(closers, s.Close)
		go func() {
			_ = f.receive(s) // the sender misses its answers
			_ = s.Close()
		}()
	}
	return n, nil
}

// upload sends everything and returns when it is durable.
func (n *boundNet) upload() error {
	ready := make([]chan struct{}, len(n.chunks)) // closed when the chunk's parity is computed
	for i := range ready {
		ready[i] = make(chan struct{})
	}
	var g errgroup.Group
	for shard, c := range n.conns {
		g.Go(func() error {
			for chunk, shards := range n.chunks {
				if shard >= n.data {
					<-ready[chunk]
				}
				var head [8]byte
				binary.LittleEndian.PutUint32(head[:], uint32(chunk*len(n.conns)+shard))
				binary.LittleEndian.PutUint32(head[4:], uint32(len(shards[shard])))
				if _, err := (&net.Buffers{head[:], shards[shard]}).WriteTo(c); err != nil {
					return err
				}
			}
			return readFull(c, make([]byte, len(n.chunks)))
		})
	}
	var err error
	for i, shards := range n.chunks {
		if n.codec != nil {
			err = errors.Join(err, n.codec.Encode(shards))
		}
		close(ready[i])
	}
	return errors.Join(err, g.Wait())
}

// receive writes what comes to files and answers each with a byte when it is durable.
func (f *boundFiles) receive(c net.Conn) error {
	var syncs errgroup.Group
	defer syncs.Wait()
	var answer sync.Mutex
	buf := make([]byte, boundPiece)
	for {
		var head [8]byte
		if err := readFull(c, head[:]); err != nil {
			return err
		}
		left := int(binary.LittleEndian.Uint32(head[4:]))
		file, err := f.create(int(binary.LittleEndian.Uint32(head[:])), left)
		if err != nil {
			return err
		}
		for left > 0 && err == nil {
			var got int
			if got, err = c.Read(buf[:min(left, len(buf))]); got > 0 {
				_, err = file.Write(buf[:got])
				left -= got
			}
		}
		if err != nil {
			file.Close()
			return err
		}
		syncs.Go(func() error {
			defer file.Close()
			if err := unix.Fdatasync(int(file.Fd())); err != nil {
				_ = c.Close()
				return err
			}
			answer.Lock()
			defer answer.Unlock()
			_, err := c.Write(head[:1])
			return err
		})
	}
}
