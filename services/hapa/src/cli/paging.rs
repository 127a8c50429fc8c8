//! Reading paginated lists to their end or up to a number of rows.

use crate::cli::CliError;

/// Maximum page size of the API.
pub(super) const MAX_PAGE_SIZE: i32 = 1_000;

/// One page of a list.
pub(super) struct Page<T> {
    pub(super) rows: Vec<T>,
    /// Empty on the last page.
    pub(super) next_page_token: String,
}

/// Fetches pages until `limit` rows were read (0: all) and passes each to `on_page` as it arrives.
///
/// `fetch` receives a page size and a page token. Returns whether more rows exist.
pub(super) async fn for_each_page<T>(
    limit: u32,
    mut fetch: impl AsyncFnMut(i32, String) -> Result<Page<T>, CliError>,
    mut on_page: impl FnMut(Vec<T>) -> Result<(), CliError>,
) -> Result<bool, CliError> {
    let mut remaining = if limit == 0 { u32::MAX } else { limit };
    let mut page_token = String::new();
    loop {
        let page_size =
            i32::try_from(remaining).map_or(MAX_PAGE_SIZE, |rows| rows.min(MAX_PAGE_SIZE));
        let page = fetch(page_size, page_token).await?;
        remaining = remaining.saturating_sub(u32::try_from(page.rows.len())?);
        on_page(page.rows)?;
        let has_more = !page.next_page_token.is_empty();
        if remaining == 0 || !has_more {
            return Ok(has_more);
        }
        page_token = page.next_page_token;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a list of 2,500 rows; returns the number of rows read and whether more exist.
    async fn read(limit: u32) -> (usize, bool) {
        let fetch = async |page_size: i32, page_token: String| {
            let start: usize = page_token.parse().unwrap_or(0);
            let end = (start + usize::try_from(page_size)?).min(2_500);
            let next_page_token = if end < 2_500 { end.to_string() } else { String::new() };
            Ok(Page { rows: (start..end).collect(), next_page_token })
        };
        let mut rows = Vec::new();
        let on_page = |page| {
            rows.extend(page);
            Ok(())
        };
        let has_more = for_each_page(limit, fetch, on_page).await.unwrap();
        assert!(rows.iter().copied().eq(0..rows.len()), "rows arrive once and in order");
        (rows.len(), has_more)
    }

    #[tokio::test]
    async fn pages_are_read_up_to_the_limit_or_to_the_end() {
        assert_eq!(read(0).await, (2_500, false));
        assert_eq!(read(50).await, (50, true));
        assert_eq!(read(1_500).await, (1_500, true));
        assert_eq!(read(9_999).await, (2_500, false));
    }
}
