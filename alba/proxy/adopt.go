package proxy

import (
	"context"
	"errors"
	"fmt"
	"io"

	"scoria/alba"
	"scoria/alba/asd"
)

// Source is what is stored as an object.
type Source struct {
	Data io.ReaderAt
	Size int64 // bytes

	// LocalPath, if set, is a file of this host that holds exactly the object and will
	// never be changed, only removed. A device in this process and on the same file
	// system may then share it.
	LocalPath string
	// Sums, if set, returns the CRC32C of each alba.BlockSize bytes of the object from
	// when it was written, so that a file which is shared need not be read. It is
	// called at most once per attempt, by the goroutine that puts.
	Sums func() ([]uint32, error)
}

// adopt has the upload's device take the source's file, if it can and the object is
// stored as it is, and commits; false if it has to be copied.
func (u *upload) adopt(ctx context.Context, src *Source) (done bool, err error) {
	a, m := u.adopter(ctx, src)
	if a == nil {
		return false, nil
	}
	sums, err := src.sums(ctx)
	if err != nil {
		return false, err
	}
	u.m.Stored = src.Size
	err = u.adoptBy(ctx, a, m, src.LocalPath, u.fileParts(sums))
	if errors.Is(err, asd.ErrNotAdopted) {
		u.p.opts.Log.Debug().Err(err).Str("object", u.m.Object).Msg("copied in place of being adopted")
		return false, nil
	}
	if err != nil {
		// The registry decides whether an owner is stale: its epoch is compared at the
		// next attempt.
		return false, fmt.Errorf("%w: device %s: %w", errAgain, m.Record().ID, err)
	}
	u.adopted = true
	if err := u.commit(ctx, false); err != nil {
		return false, err
	}
	u.p.active.Delete(u.m.Upload)
	u.p.counters.Adopted.Add(1)
	return true, nil
}

// adopter is the device that may take the file; nil if there is none.
func (u *upload) adopter(ctx context.Context, src *Source) (asd.Adopter, *Member) {
	m := u.m
	plain := m.Compression == alba.CompressNone && m.Encryption == alba.EncryptNone
	if src.LocalPath == "" || !plain || len(m.Shards) != 1 || m.Shards[0] == "" || src.Size < int64(asd.DefaultBlockSize) ||
		src.Size%alba.BlockSize != 0 || m.Layout().ChunkBytes()%alba.BlockSize != 0 {
		return nil, nil
	}
	// Small objects go with the key-value store's log, which is quicker than a file.
	if src.Size < adoptBytes || (src.Size+int64(m.FragmentBytes)-1)/int64(m.FragmentBytes) > asd.MaxUpdates/2 {
		return nil, nil
	}
	member := u.p.fleet.Member(m.Shards[0])
	if member == nil {
		return nil, nil
	}
	c, err := member.Client(ctx)
	if err != nil {
		return nil, nil
	}
	a, _ := c.(asd.Adopter)
	return a, member
}

// adoptBytes is the least size of an object that is adopted.
const adoptBytes = 64 << 10

// sums returns the checksums of the source's blocks, computed if need be.
func (s *Source) sums(ctx context.Context) ([]uint32, error) {
	if s.Sums != nil {
		sums, err := s.Sums()
		if err == nil && int64(len(sums)) != s.Size/alba.BlockSize {
			err = fmt.Errorf("%d checksums for %d bytes", len(sums), s.Size)
		}
		return sums, err
	}
	sums := make([]uint32, 0, s.Size/alba.BlockSize)
	buf := make([]byte, min(s.Size, 1<<20))
	for off := int64(0); off < s.Size; off += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		p := buf[:min(int64(len(buf)), s.Size-off)]
		if n, err := s.Data.ReadAt(p, off); n < len(p) {
			if err == nil || errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, fmt.Errorf("read the object at %d of %d: %w", off+int64(n), s.Size, err)
		}
		for ; len(p) > 0; p = p[alba.BlockSize:] {
			sums = append(sums, asd.CRC(p[:alba.BlockSize]))
		}
	}
	return sums, nil
}

// fileParts cuts the object into its fragments.
func (u *upload) fileParts(sums []uint32) []asd.FilePart {
	l := u.m.Layout()
	parts := make([]asd.FilePart, l.Chunks())
	for c := range parts {
		off, size := int64(c)*l.ChunkBytes(), int64(l.FragmentLen(c))
		parts[c] = asd.FilePart{Key: alba.FragmentKey(u.m.NamespaceID, u.m.Upload, 0, c), Off: off, Size: size,
			CRCs: sums[off/alba.BlockSize : (off+size)/alba.BlockSize]}
	}
	return parts
}

// adoptBy makes the fragments durable on the device, with the shard's manifest.
func (u *upload) adoptBy(ctx context.Context, a asd.Adopter, m *Member, file string, parts []asd.FilePart) error {
	ctx, cancel := context.WithTimeout(ctx, u.p.writeTimeout)
	defer cancel()
	mark := asd.Put(alba.ShardKey(u.m.NamespaceID, u.m.Upload, 0), asd.NewValue(u.m.Encode()))
	return m.owned(&u.ns, u.epoch, []asd.Update{mark}, func(asserts []asd.Assert, updates []asd.Update) error {
		err := a.Adopt(ctx, file, parts, asserts, updates, u.pri)
		if errors.Is(err, asd.ErrNotAdopted) {
			return err // says nothing about the device
		}
		return m.note(ctx, 0, err)
	})
}
